"""The parts that layers are built from: linears, norm, attention. Chosen once, by the configuration and the device."""

from dataclasses import dataclass
from importlib.util import find_spec

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP

from megatron_hybrid.arch.model import Backend
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.mixers.attention.module import ScaledDotProductAttention
from megatron_hybrid.model.mlp import SwiGLU
from megatron_hybrid.model.norms import RMSNorm
from megatron_hybrid.precision.support import check_support


@dataclass(frozen=True)
class Parts:
    """Constructors with the arguments of megatron-core's modules of the same kind."""

    name: str
    column_linear: type
    norm_column_linear: type | None
    """RMSNorm and column-parallel linear in one; None: the layer's own norm stands before a column_linear."""
    row_linear: type
    norm: type
    attention: type
    plain_attention: type
    """The same in train.dtype: what FP8 attention is held against."""
    mlp: type[MLP]


LOCAL = Parts(
    "megatron-core and torch",
    ColumnParallelLinear,
    None,
    RowParallelLinear,
    RMSNorm,
    ScaledDotProductAttention,
    ScaledDotProductAttention,
    SwiGLU,
)


def choose_parts(backend: Backend, precision: PrecisionConfig, dtype: str) -> tuple[Parts, str]:
    """The parts of a run, and why.

    Raises:
        ConfigError: Transformer Engine is asked for, by name or by an FP8 format, where it cannot run.
    """
    installed = find_spec("transformer_engine") is not None
    obstacles = [
        (not has_cuda(), "no CUDA device is visible"),
        (not installed, "Transformer Engine is not installed (HYBRID_EXTRAS=dev,gpu source tools/env.sh)"),
        (dtype == "fp32", "train.dtype is fp32, which Transformer Engine multiplies in TF32"),
    ]
    obstacle = next((reason for there, reason in obstacles if there), None)
    if backend == "local":
        return LOCAL, "model.backend = local"
    if obstacle is None:
        from megatron_hybrid.model.te_parts import transformer_engine_parts

        check_support(precision)
        reason = "model.backend = transformer_engine" if backend != "auto" else "bf16 on a GPU"
        return transformer_engine_parts(precision), reason
    if backend == "transformer_engine":
        raise ConfigError.at("model.backend", f"transformer_engine cannot run: {obstacle}; set it to auto")
    if precision.fp8:
        raise ConfigError.at("precision.fp8_recipe", f"{precision.fp8_recipe} cannot run: {obstacle}; set it to null")
    return LOCAL, obstacle


def require_transformer_engine(field: str, backend: Backend, precision: PrecisionConfig, dtype: str) -> None:
    """Check that the layers of a run are built from Transformer Engine's modules.

    Args:
        field: the configuration field that needs them.

    Raises:
        ConfigError: they are not; the message says why.
    """
    parts, reason = choose_parts(backend, precision, dtype)
    if parts is LOCAL:
        raise ConfigError.at(
            field, f"true needs Transformer Engine's modules, which cannot run: {reason}; set it to false"
        )
