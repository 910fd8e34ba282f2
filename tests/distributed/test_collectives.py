"""Collectives of tensor parallel ranks per micro-batch, counted: nothing is sent twice."""

from collections import Counter

import torch.distributed as dist

from testing import jobs
from testing.models import SMALLEST

TOKENS, HIDDEN = jobs.SEQUENCE_LENGTH, SMALLEST["hidden_size"]


def sent(micro_batches: int) -> Counter:
    """(kind, elements of the whole tensor) -> how often, in one step's forward and backward pass."""
    from megatron.core.tensor_parallel import layers, mappings

    counts = Counter()

    def counted(kind: str, function, whole: int):
        def call(*args, **kwargs):
            counts[kind, args[whole].numel()] += 1
            return function(*args, **kwargs)

        return call

    train = dict(steps=1, global_batch_size=micro_batches, dtype="fp32")
    dist.all_reduce = counted("sum", dist.all_reduce, 0)  # modules bind it when they are built
    engine = jobs.make_engine(SMALLEST, dict(tensor_parallel_size=2), train)
    for module in (layers, mappings):
        module.dist_all_gather_func = counted("gather", module.dist_all_gather_func, 0)
        module.dist_reduce_scatter_func = counted("scatter", module.dist_reduce_scatter_func, 1)
    samples = jobs.samples_of_step(0, micro_batches, SMALLEST["vocab_size"])
    engine.forward_backward(jobs.batches_of(engine, samples, 1))
    return counts


def test_what_a_micro_batch_sends(ranks):
    one, two = (ranks.run(sent, 2, micro_batches=count)[0] for count in (1, 2))
    layers, stream = len(SMALLEST["layer_pattern"]), TOKENS * HIDDEN
    more = two - one
    assert more.pop(("gather", stream)) == 6 * layers + 2, "inputs, again for weights, gradients; embedding's, head's"
    assert more.pop(("scatter", stream)) == 4 * layers + 2
    assert more.pop(("sum", 2 * TOKENS)) == 2 + 1, "squares of q and k and their gradients; the softmax's sums"
    assert more.pop(("sum", TOKENS)) == 1, "the largest logits"
    assert not more
