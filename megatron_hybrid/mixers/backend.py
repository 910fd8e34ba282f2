"""The modules that layers are built from. `model/backends` and the layer spec library choose them."""

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.mlp import MLP


@dataclass(frozen=True)
class Backend:
    """Constructors with the arguments of megatron-core's modules of the same kind."""

    name: str
    column_linear: type
    norm_column_linear: type | None
    """Norm and column-parallel linear in one. None: the layer has a `pre_norm` of its own in front of a column_linear."""
    row_linear: type
    norm: Any
    pre_norm: Any
    """Norm in front of a sublayer. It may return the residual stream as well: (norm, stream)."""
    attention: type
    plain_attention: type
    """Attention in train.dtype, with which FP8 attention is compared."""
    mlp: type[MLP]


@dataclass(frozen=True)
class Linears:
    """Constructors of a mixer's linears, with the norms that its block asks for."""

    input: Any
    """Column-parallel; a pre-norm may be fused into it."""
    output: Any
    """Row-parallel; a post-norm follows it."""
