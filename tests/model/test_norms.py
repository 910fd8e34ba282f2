"""Norms of the residual stream: torch's RMSNorm is the oracle, and a pre-norm changes no gradient of its sublayer."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_hybrid.model.norms import PreNorm, RMSNorm


def config_of(**fields):
    defaults = dict(layernorm_zero_centered_gamma=False, use_cpu_initialization=True, params_dtype=torch.float32)
    return SimpleNamespace(**defaults | dict(sequence_parallel=False) | fields)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_is_torch_s_rmsnorm(zero_centered):
    norm, oracle = RMSNorm(config_of(layernorm_zero_centered_gamma=zero_centered), 24, 1e-5), nn.RMSNorm(24, eps=1e-5)
    x = torch.randn(3, 2, 24)
    assert torch.equal(norm(x), oracle(x))
    with torch.no_grad():
        norm.weight.normal_()
        oracle.weight.copy_(norm.weight + 1 if zero_centered else norm.weight)
    assert torch.allclose(norm(x), oracle(x), atol=1e-6)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_gradient_is_summed_over_ranks_that_share_the_tokens(sequence_parallel):
    assert PreNorm(config_of(sequence_parallel=sequence_parallel), 24).weight.sequence_parallel is sequence_parallel


def test_a_pre_norm_returns_the_stream_with_its_norm():
    norm, plain, linear = PreNorm(config_of(), 24), RMSNorm(config_of(), 24), nn.Linear(24, 24)
    found = []
    for pre in (norm, lambda x: (plain(x), x)):
        x = torch.randn(3, 2, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y, stream = pre(x)
        out = stream + linear(y)
        weight = norm.weight if pre is norm else plain.weight
        found.append([out.detach(), *torch.autograd.grad(out, [x, weight], out.detach().cos())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        assert torch.equal(norm(x), plain(x))
