"""gated_rmsnorm in plain torch against transformers' module and gradcheck."""

import pytest
import torch

from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from hybrid_kernels.testing import relative_error


def test_agrees_with_transformers():
    olmo = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    norm = olmo.OlmoHybridRMSNormGated(8, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    o, packed = torch.randn(2, 5, 3, 8), torch.randn(5, 2, 40)
    gate = packed[..., 10:34]
    theirs = norm(o.transpose(0, 1).reshape(-1, 8), gate.reshape(-1, 8)).reshape(5, 2, 24)
    ours = gated_rmsnorm(o, gate, norm.weight, 1e-5)
    assert ours.is_contiguous() and relative_error(ours, theirs) < 1e-5


def test_the_sigmoid_agrees_with_transformers():
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    norm = kimi.KimiLinearRMSNormGated(8, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    o, gate = torch.randn(2, 5, 3, 8), torch.randn(5, 2, 24)
    theirs = norm(o, gate.transpose(0, 1).unflatten(-1, (3, 8))).flatten(2).transpose(0, 1)
    assert relative_error(gated_rmsnorm(o, gate, norm.weight, 1e-5, activation="sigmoid"), theirs) < 1e-5


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gradcheck(activation):
    o, gate, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 3, 2, 4), (3, 1, 8), (4,)))
    assert torch.autograd.gradcheck(lambda *x: gated_rmsnorm(*x, 1e-5, activation=activation), (o, gate, weight))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="gate_sbw"):
        gated_rmsnorm(torch.randn(1, 3, 2, 4), torch.randn(1, 3, 8), torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="activation: expected one of silu, sigmoid, got 'gelu'"):
        gated_rmsnorm(torch.randn(1, 3, 2, 4), torch.randn(3, 1, 8), torch.ones(4), 1e-5, activation="gelu")
    with pytest.raises(ValueError, match="weight"):
        gated_rmsnorm(torch.randn(1, 3, 2, 4), torch.randn(3, 1, 8), torch.ones(8), 1e-5)
