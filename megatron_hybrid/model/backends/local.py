"""The backend for any device: megatron-core's linears, torch's attention and norm."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_hybrid.mixers.attention.local import ScaledDotProductAttention
from megatron_hybrid.mixers.backend import Backend
from megatron_hybrid.model.mlp import SwiGLU
from megatron_hybrid.model.norms import RMSNorm

LOCAL = Backend(
    name="megatron-core and torch",
    column_linear=ColumnParallelLinear,
    norm_column_linear=None,
    row_linear=RowParallelLinear,
    norm=RMSNorm,
    attention=ScaledDotProductAttention,
    plain_attention=ScaledDotProductAttention,
    mlp=SwiGLU,
)
