"""Jobs of Kimi Delta Attention's tests, which run on ranks."""

import torch
import torch.distributed as dist

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.mixers.kda.slices import kda_rule_of_slices
from tests.distributed.slice_jobs import results
from tests.mixers.kda.models import KIMI, kimi_model, our_tensors
from tests.model.incremental_jobs import errors_against, network_with

INCREMENTAL = dict(lengths=[70, 1, 33], chunk=40, steps=20)
"""Prompts of three lengths in chunks, one of which ends in the first chunk, and tokens after them."""


def decoding_errors_against_transformers(tensor_parallel_size: int) -> list[float]:
    """Return the largest error of each sequence's logits, from prompts in chunks and single tokens."""
    peer, config = kimi_model(), ModelConfig(**KIMI)
    network = network_with(config, our_tensors(peer), tensor_parallel_size)
    return errors_against(lambda x: peer(x, use_cache=False).logits, network, config, **INCREMENTAL)


def decoding_errors_against_training(model: dict) -> list[float]:
    """Return the same against the network's own forward pass, as it is trained."""
    config, generator = ModelConfig(**model), torch.Generator().manual_seed(2)
    tensors = {
        name: 0.05 * torch.randn(spec.shape, generator=generator) + ("norm" in name)
        for name, spec in model_tensors(config).items()
    }
    network = network_with(config, tensors)
    return errors_against(lambda x: network(x)[..., : config.vocab_size], network, config, **INCREMENTAL)


def rule_of_slice(
    inputs: list, gate: list, given: list, bounds: list[int], positions: torch.Tensor | None
) -> list[torch.Tensor]:
    """Return o and the gradients of five inputs [b, s of this rank, ...], and those of A_log and dt_bias, summed over all ranks."""
    mine = slice(*bounds[dist.get_rank() : dist.get_rank() + 2])
    positions_bs = None if positions is None else positions[:, mine]

    def rule(q, k, v, g, beta, A_log, dt_bias):
        options = dict(group=dist.group.WORLD, positions_bs=positions_bs, A_log=A_log, dt_bias=dt_bias)
        return (kda_rule_of_slices(q, k, v, g, beta, **options),)

    found = results(rule, [*(x[:, mine] for x in inputs), *gate], [x[:, mine] for x in given])
    for x in found[6:]:
        dist.all_reduce(x)
    return found
