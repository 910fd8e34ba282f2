"""Jobs of test_incremental.py, which run on ranks."""

from collections.abc import Callable

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.model.hybrid_model import HybridLanguageModel, build_model
from megatron_hybrid.model.incremental import IncrementalModel
from megatron_hybrid.model.param_layout import ParamLayout
from testing.peers import transformers_model, true_tensors_of


class _Tensors:
    """Whole tensors, read as a checkpoint's."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def read(self, name, wanted):
        return self.tensors[name][wanted.index]


def network_of(model: ModelConfig, tensor_parallel_size: int = 1) -> tuple[HybridLanguageModel, torch.nn.Module]:
    """Return a network with random weights on these ranks, and transformers' model with the same weights."""
    peer = transformers_model(model)
    return network_with(model, true_tensors_of(peer, model), tensor_parallel_size), peer


def network_with(
    model: ModelConfig, tensors: dict[str, torch.Tensor], tensor_parallel_size: int = 1
) -> HybridLanguageModel:
    """Return a network on these ranks with given true tensors."""
    parallel = ParallelConfig(tensor_parallel_size=tensor_parallel_size, sequence_parallel=False)
    groups = start_distributed(Launch.from_environment(), parallel, seed=0)
    (network,) = build_model(model, parallel, PrecisionConfig(), "fp32", 8, groups)
    layout = ParamLayout(model, groups.tp.rank(), groups.tp.size())
    Collector([network], layout, groups, {}, optimizer_sharded=False).load_weights(_Tensors(tensors))
    return network.eval()


def errors_of_logits(model: dict, lengths: list[int], chunk: int, steps: int, tensor_parallel_size: int) -> list[float]:
    """Return the largest error of every sequence's logits, prompt and continuation, against transformers' full forward."""
    config = ModelConfig(**model)
    network, peer = network_of(config, tensor_parallel_size)
    return errors_against(lambda tokens: peer(tokens).logits, network, config, lengths, chunk, steps)


def errors_against(
    full: Callable[[torch.Tensor], torch.Tensor],
    network: HybridLanguageModel,
    config: ModelConfig,
    lengths: list[int],
    chunk: int,
    steps: int,
) -> list[float]:
    """Return the same for logits [1, s, vocabulary] of whole sequences by `full`."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(config.vocab_size, (n + steps,), generator=generator) for n in lengths]
    incremental = IncrementalModel(network, len(rows), max(lengths) + steps)
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for start in range(0, max(lengths), chunk):
        valid = torch.tensor([min(max(n - start, 0), chunk) for n in lengths])
        width = -(-int(valid.max()) // 8) * 8
        tokens = torch.randint(config.vocab_size, (len(rows), width), generator=generator)  # padding is any token
        for row, tokens_of_row, count in zip(rows, tokens, valid):
            tokens_of_row[:count] = row[start : start + count]
        logits = incremental.logits(incremental.extend(tokens, valid).flatten(0, 1)).unflatten(0, (width, len(rows)))
        for i, count in enumerate(valid):
            found[i].extend(logits[:count, i])
    for step in range(steps):
        logits = incremental.step(torch.stack([row[n + step] for row, n in zip(rows, lengths)]))
        for i in range(len(rows)):
            found[i].append(logits[i])
    with torch.no_grad():
        return [(torch.stack(f) - full(r[None])[0]).abs().max().item() for f, r in zip(found, rows)]
