"""Which norms the backend of Transformer Engine takes. Its modules are stand-ins: it cannot be imported without a GPU build."""

import sys
from types import ModuleType

import pytest
import torch

from megatron_hybrid.arch.fp8_recipes import FP8_RECIPES
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.model.norms import PreNorm, RMSNorm

NAME = "megatron_hybrid.model.backends.transformer_engine"
WRAPPED = (
    "TEColumnParallelLinear",
    "TEDotProductAttention",
    "TELayerNormColumnParallelLinear",
    "TENorm",
    "TERowParallelLinear",
)


@pytest.fixture
def backends(monkeypatch):
    """The backend's module on top of classes without content."""
    wrapped = ModuleType("stand_in")
    for name in WRAPPED:
        setattr(wrapped, name, type(name, (torch.nn.Module,), {}))
    monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", wrapped)
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine_torch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    dependents = (NAME, "megatron_hybrid.mixers.attention.transformer_engine")
    for name in dependents:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield __import__(NAME, fromlist=["transformer_engine"])
    for name in dependents:
        sys.modules.pop(name, None)


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
