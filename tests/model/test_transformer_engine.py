"""The backend of Transformer Engine on stand-ins: which norms it takes, and FP8 tensors that its MLP hands to linears."""

import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_hybrid.arch.fp8_recipes import FP8_RECIPES
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.model.norms import PreNorm, RMSNorm
from testing import transformer_engine_stand_in as stand_in


@pytest.fixture
def state(monkeypatch):
    for name in stand_in.DEPENDENTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield stand_in.install(monkeypatch)
    for name in stand_in.DEPENDENTS:
        sys.modules.pop(name, None)


@pytest.fixture
def backends(state):
    """The backend's module."""
    return __import__(f"{stand_in.BACKENDS}transformer_engine", fromlist=["transformer_engine"])


@pytest.mark.parametrize("recipe", [None, *FP8_RECIPES])
def test_norms_are_ours_unless_transformer_engine_s_write_fp8(recipe, backends):
    backend = backends.transformer_engine(PrecisionConfig(fp8_recipe=recipe))
    chosen = (backend.norm, backend.pre_norm, backend.norm_column_linear)
    theirs = (backends.TENorm, backends.TENorm, backends.NormColumnLinear)
    assert chosen == (theirs if recipe == "delayed" else (RMSNorm, PreNorm, None))
    assert (backend.column_linear, backend.row_linear) == (backends.ColumnLinear, backends.RowLinear)


def test_transformer_engine_s_norms_change_nothing_else(backends):
    ours, delayed = (backends.transformer_engine(PrecisionConfig(fp8_recipe=one)) for one in (None, "delayed"))
    assert backends.transformer_engine_norms(ours) == delayed


def mlp(backends, recompute: str | None = None):
    """An MLP of the backend whose linears multiply in FP8."""
    made = backends.FusedSwiGLU.__new__(backends.FusedSwiGLU)
    torch.nn.Module.__init__(made)
    made.config = SimpleNamespace(recompute_granularity=recompute)
    torch.manual_seed(0)
    made.linear_fc1 = stand_in.Linear(16, 64, bias=False, dtype=torch.bfloat16)
    made.linear_fc2 = stand_in.Linear(32, 16, bias=False, dtype=torch.bfloat16)
    return made


def outputs_and_gradients(module, shape=(5, 3, 16)) -> list[torch.Tensor]:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    y, _ = module(x)
    y.backward(y.detach().cos())
    return [y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.mark.parametrize("recompute", [None, "selective"])
def test_handed_casts_are_those_that_linears_make(recompute, backends, state, monkeypatch):
    handed, flatten = [], backends.HandedGradient.reshape
    monkeypatch.setattr(backends.HandedGradient, "reshape", lambda x, *to: handed.append(x.shape) or flatten(x, *to))
    expected = outputs_and_gradients(mlp(backends))
    assert not handed
    state.recipe = stand_in.recipe()
    found = outputs_and_gradients(mlp(backends, recompute))
    assert handed == [(5, 3, 64)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nothing_is_cast_column_wise_without_gradients(backends, state, monkeypatch):
    state.recipe, module, columnwise = stand_in.recipe(), mlp(backends), []
    monkeypatch.setattr(module.linear_fc2, "forward", lambda x: (columnwise.append(x._transpose is not None), None))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            module(torch.randn(2, 3, 16, dtype=torch.bfloat16))
    assert columnwise == [True, False]


@pytest.mark.parametrize("recipe", [None, stand_in.recipe(False), stand_in.recipe(backward_override="dequantized")])
def test_linears_cast_themselves_unless_they_scale_by_the_current_tensor(recipe, backends, state):
    state.recipe = recipe
    assert backends.current_scaling() is None


def test_a_reader_that_reshapes_otherwise_is_an_error(backends):
    gradient = backends.HandedGradient.of(stand_in.Quantizer("e5m2", "cpu")(torch.randn(2, 3, 4)))
    flat = gradient.reshape((-1, 4))
    assert flat._data.shape == (6, 4) and torch.equal(flat._transpose, flat._data.t())
    assert torch.equal(gradient.dequantize(), flat.dequantize().view(2, 3, 4))
    with pytest.raises(ValueError, match="handed to a reader that reshapes"):
        gradient.reshape(4, 6)
