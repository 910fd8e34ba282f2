"""Kernel of `gated_delta_step`. A program holds all rows and VB columns of the state of one head of one sequence."""

import triton
import triton.language as tl


@triton.jit
def step_kernel(
    q, k, v, g, beta, state, o, scale, H, GROUP,
    K: tl.constexpr, V: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)  # numbered over [b, H]
    key_head = head // H * (H // GROUP) + head % H // GROUP
    rows, cols = tl.arange(0, KB), tl.program_id(1) * VB + tl.arange(0, VB)
    row_mask, col_mask = rows < K, cols < V
    mask = row_mask[:, None] & col_mask[None, :]
    at = state + head.to(tl.int64) * K * V + rows[:, None] * V + cols[None, :]
    s = tl.load(at, mask=mask, other=0.0)
    if PER_CHANNEL:
        s *= tl.exp(tl.load(g + head * K + rows, mask=row_mask, other=0.0))[:, None]
    else:
        s *= tl.exp(tl.load(g + head))
    key = tl.load(k + key_head * K + rows, mask=row_mask, other=0.0).to(tl.float32)
    query = tl.load(q + key_head * K + rows, mask=row_mask, other=0.0).to(tl.float32)
    value = tl.load(v + head * V + cols, mask=col_mask, other=0.0).to(tl.float32)
    correction = (value - tl.sum(s * key[:, None], 0)) * tl.load(beta + head)
    s += key[:, None] * correction[None, :]
    tl.store(at, s, mask=mask)
    out = tl.sum(s * query[:, None], 0) * scale
    tl.store(o + head * V + cols, out.to(o.dtype.element_ty), mask=col_mask)
