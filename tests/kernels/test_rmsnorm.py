"""rmsnorm in plain torch against transformers' modules and gradcheck."""

import pytest
import torch

from hybrid_kernels.rmsnorm import explain, residual_rmsnorm, rmsnorm
from hybrid_kernels.testing import relative_error


def test_agrees_with_transformers():
    olmo = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    norm = olmo.OlmoHybridRMSNorm(24, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 2, 24)
    assert relative_error(rmsnorm(x, norm.weight, 1e-5), norm(x)) < 1e-6


def test_a_zero_centered_weight_agrees_with_transformers():
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    norm = qwen.Qwen3_5RMSNorm(24, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 2, 24)
    assert relative_error(rmsnorm(x, norm.weight, 1e-5, zero_centered=True), norm(x)) < 1e-6


def test_the_stream_is_the_sum_and_its_norm_is_that_of_the_sum():
    x, residual, weight = torch.randn(3, 2, 24).bfloat16(), torch.randn(3, 2, 24).bfloat16(), torch.randn(24)
    stream, y = residual_rmsnorm(x, residual, weight, 1e-5)
    assert torch.equal(stream, x + residual) and torch.equal(y, rmsnorm(x + residual, weight, 1e-5))
    stream, y = residual_rmsnorm(x, None, weight, 1e-5)
    assert torch.equal(stream, x) and torch.equal(y, rmsnorm(x, weight, 1e-5))


@pytest.mark.parametrize("zero_centered", [False, True])
def test_gradcheck(zero_centered):
    x, residual = (torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, options = torch.randn(6, dtype=torch.float64, requires_grad=True), dict(zero_centered=zero_centered)
    assert torch.autograd.gradcheck(lambda *a: rmsnorm(*a, 1e-5, **options), (x, weight))
    assert torch.autograd.gradcheck(lambda *a: residual_rmsnorm(*a, 1e-5, **options), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda a, w: residual_rmsnorm(a, None, w, 1e-5, **options), (x, weight))


def test_the_choice_is_explained():
    choice = explain(torch.randn(2, 24), torch.ones(24))
    assert choice.backend == "torch" and "not on a CUDA device" in choice.rejected["triton"]


def test_refuses_what_does_not_fit():
    x = torch.randn(2, 3, 24)
    with pytest.raises(ValueError, match="weight: expected"):
        rmsnorm(x, torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="weight: expected"):
        rmsnorm(torch.tensor(1.0), torch.ones(1), 1e-5)
    with pytest.raises(ValueError, match="residual: expected"):
        residual_rmsnorm(x, x[:1], torch.ones(24), 1e-5)
    with pytest.raises(ValueError, match="residual: expected .* torch.float32 as x"):
        residual_rmsnorm(x, x.bfloat16(), torch.ones(24), 1e-5)
    with pytest.raises(ValueError, match="cannot run here"):
        rmsnorm(x, torch.ones(24), 1e-5, backend="triton")
