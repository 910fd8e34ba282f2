"""Operators of a step on documents: they do not depend on the number of documents, and the host reads no boundary."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hybrid.data.batch import Batch
from testing.document_parity import plain_sample
from testing.documents import starts_of_rows
from testing.fidelity import BASE
from testing.jobs import make_engine

READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten._unique")
"""Operators that wait for the device."""


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **kwargs or {})


def operators(context_parallel_size: int, many: list[list[list[int]]]) -> list[Counter[str]]:
    """Return the operators of forward and backward passes over rows of documents, and of one over rows without."""
    length = sum(many[0][0])
    parallel = {"context_parallel_size": context_parallel_size}
    engine = make_engine(BASE, parallel, {"steps": 1, "global_batch_size": 2, "dtype": "fp32"}, length)
    (chunk,), group = engine.chunks, engine.groups.cp
    tokens = torch.zeros(2, length, dtype=torch.int64)
    found = []
    for rows in (None, *many, *many):  # the first pass fills caches of angles
        batch = Batch.of_samples(torch.zeros(2, length + 1, dtype=torch.int64))
        if rows:
            starts = starts_of_rows(rows)
            batch = Batch.collate([plain_sample(t, s) for t, s in zip(tokens.numpy(), starts, strict=True)])
        mine = batch.slice(group.rank(), group.size())
        with Operators() as watch:
            losses = chunk(mine.tokens, mine.labels, mine.loss_mask, 0.0, mine.documents, mine.cu_seqlens)
            losses.total.backward()
        found.append(watch.counts)
    return [*found[1 + len(many) :], found[0]]


@pytest.mark.parametrize("size", [1, 2])
def test_operators_do_not_depend_on_documents(size, ranks):
    rows = [[[24, 24], [48]], [[1] * 48, [1, 1, 46]], [[3] * 16, [40, 8]]]
    for *found, without in ranks.run(operators, size, context_parallel_size=size, many=rows):
        assert found[0] == found[1] == found[2]
        for name in READS:
            reads, before = (sum(n for op, n in ops.items() if op.startswith(name)) for ops in (found[0], without))
            assert reads <= before, name
