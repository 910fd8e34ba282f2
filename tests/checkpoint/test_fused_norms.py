"""Checkpoints of layers whose pre-norms are fused into linears, loaded by layers with norms of their own, and the other way round."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from hybrid_kernels.rmsnorm import rmsnorm
from megatron_hybrid.model.backends import choose
from megatron_hybrid.model.backends.local import LOCAL
from testing import jobs
from testing.models import SMALL, small

STEPS = 3
TRAIN = dict(steps=STEPS, global_batch_size=2, dtype="bf16")
CASES = {"pre and post, TP2": (2, SMALL, dict(tensor_parallel_size=2)), "peri": (1, small("GA", 64, 4, 2, 16), {})}


class FusedNorm(ColumnParallelLinear):
    """A column-parallel linear that holds the norm in front of it, under Transformer Engine's name (layernorm_linear.py)."""

    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return super().forward(rmsnorm(x, self.layer_norm_weight, self.eps))


def curve(fused: bool, **arguments) -> dict:
    with patch.object(choose, "LOCAL", replace(LOCAL, norm_column_linear=FusedNorm) if fused else LOCAL):
        return jobs.curve(**arguments)


def norms(parameters: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in parameters if name.endswith(("layernorm.weight", "layer_norm_weight"))}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fused_first", [True, False], ids=["fused first", "fused last"])
def test_every_tensor_and_moment_has_the_same_bits(fused_first, name, ranks, tmp_path):
    count, model, parallel = CASES[name]
    common = dict(model=model, parallel=parallel, train=TRAIN)
    first = ranks.run(curve, count, fused=fused_first, steps=2, save=str(tmp_path / "first"), **common)[0]
    options = dict(start=2, load=first["path"], **common)
    again = ranks.run(curve, count, fused=not fused_first, steps=2, save=str(tmp_path / "again"), **options)[0]
    assert not jobs.different_tensors(first["path"], again["path"])
    by_name = [norms(found["parameters"]) for found in (first, again)]
    assert by_name[0].isdisjoint(by_name[1]) and len(by_name[0]) == len(by_name[1]) > 0
    onward = [ranks.run(curve, count, fused=one, steps=STEPS, **options)[0]["losses"] for one in (True, False)]
    assert onward[0] == pytest.approx(onward[1], rel=1e-6)
