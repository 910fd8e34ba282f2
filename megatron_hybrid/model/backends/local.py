"""The backend for any device: megatron-core's linears, torch's attention, and the norm that hybrid_kernels chooses."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_hybrid.mixers.attention.local import ScaledDotProductAttention
from megatron_hybrid.mixers.backend import Backend
from megatron_hybrid.model.mlp import SwiGLU
from megatron_hybrid.model.norms import PreNorm, RMSNorm

LOCAL = Backend(
    name="megatron-core and torch",
    column_linear=ColumnParallelLinear,
    norm_column_linear=None,
    row_linear=RowParallelLinear,
    norm=RMSNorm,
    pre_norm=PreNorm,
    attention=ScaledDotProductAttention,
    plain_attention=ScaledDotProductAttention,
    mlp=SwiGLU,
)
