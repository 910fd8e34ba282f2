"""Launch of `gated_delta_step` in Triton."""

import torch
import triton

from hybrid_kernels.custom_op import eager_only
from hybrid_kernels.gated_delta_step.backends.triton.kernels import step_kernel

COLUMNS = 32
"""Columns of the state per program: enough programs to fill a GPU at batch size 1, and 32 registers per thread at 128 rows."""


@eager_only
def gated_delta_step_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See `hybrid_kernels.gated_delta_step.gated_delta_step`."""
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g.float(), beta.float()))
    batch, heads, value_dim = v.shape
    key_dim = k.shape[2]
    o = torch.empty_like(v)
    step_kernel[(batch * heads, triton.cdiv(value_dim, COLUMNS))](
        q, k, v, g, beta, state, o, scale, heads, heads // k.shape[1],
        K=key_dim, V=value_dim, KB=triton.next_power_of_2(key_dim), VB=COLUMNS,
        PER_CHANNEL=g.dim() == 3, num_warps=4,
    )  # fmt: skip
    return o
