"""Kernels of `head_norm_rope`, one for each direction. A program takes ROWS heads of q, k, v or the gate of a token.

Channel i of the first R is rotated together with its partner, R / 2 channels away. Partners are loaded a second time, from the
cache, because a head is one row of a tile.
"""

import triton
import triton.language as tl

from hybrid_kernels.qk_norm_rope.backends.triton.kernels import _cos_sin

Q, K, V, GATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _part(block, heads, groups, ROWS: tl.constexpr):
    """Return which part of the projection a block of heads is in, its first head there, and the heads of all parts before."""
    q_blocks, k_blocks = tl.cdiv(heads, ROWS), tl.cdiv(groups, ROWS)
    part = (block >= q_blocks).to(tl.int32) + (block >= q_blocks + k_blocks).to(tl.int32)
    part += (block >= q_blocks + 2 * k_blocks).to(tl.int32)
    before = tl.minimum(part, 1) * q_blocks + tl.maximum(tl.minimum(part, 3) - 1, 0) * k_blocks
    heads_before = tl.minimum(part, 1) * heads + tl.maximum(tl.minimum(part, 3) - 1, 0) * groups
    return part, (block - before) * ROWS, heads_before


@triton.jit
def _partners(D2: tl.constexpr, R: tl.constexpr):
    """Return each channel, its partner, the index of its angle, and the sign of the sine: 0 where nothing is rotated."""
    column = tl.arange(0, D2)
    low, turned = column < R // 2, column < R
    partner = tl.where(low, column + R // 2, tl.where(turned, column - R // 2, column))
    sign = tl.where(low, -1.0, tl.where(turned, 1.0, 0.0))
    return column, partner, tl.where(low, column, column - R // 2), sign


@triton.jit
def _angles(angles, index, R: tl.constexpr, D2: tl.constexpr):
    """Return cosine and sine of a token's angles by channel, 1 and 0 where nothing is rotated."""
    return _cos_sin(tl.load(angles + index, mask=tl.arange(0, D2) < R, other=0.0).to(tl.float32))


@triton.jit
def forward_kernel(
    packed, q_weight, k_weight, angles, q, k, v, width, tokens_per_angles, heads, groups, eps,
    D: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write q, k and v. R: 0 without rotary embedding."""
    token = tl.program_id(0).to(tl.int64)
    part, first, before = _part(tl.program_id(1), heads, groups, ROWS)
    n = tl.where(part == Q, heads, groups)
    eps = tl.full([], eps, tl.float32)  # torch.compile passes Python's floats as fp64
    column, partner, index, sign = _partners(D2, R)
    head = first + tl.arange(0, ROWS)
    mask = (head < n)[:, None] & (column < D)[None, :]
    row = head[:, None] * D
    x_at = packed + token * width + before * D + row
    raw = tl.load(x_at + column[None, :], mask=mask, other=0.0)
    if part == V:
        tl.store(v + token * groups * D + row + column[None, :], raw, mask=mask)
    else:
        weight, out = q_weight, q
        if part == K:
            weight, out = k_weight, k
        x = raw.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        y = x * scale * tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
        if R > 0:
            other = tl.load(x_at + partner[None, :], mask=mask, other=0.0).to(tl.float32) * scale
            other *= tl.load(weight + partner, mask=column < D, other=0.0).to(tl.float32)[None, :]
            cos, sin = _angles(angles + token // tokens_per_angles * R, index, R, D2)
            y = y * cos[None, :] + other * (sign * sin)[None, :]
        tl.store(out + token * n * D + row + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    packed, q_weight, k_weight, angles, dq, dk, dv, dgate, dpacked, dweights, tokens, B, width, tokens_per_angles,
    heads, groups, dq_s, dq_b, dq_h, dk_s, dk_b, dk_h, dv_s, dv_b, dv_h, dg_s, dg_b, eps,
    D: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write dpacked, and in dweights [programs, blocks of q and k, D] the sum over this program's tokens and heads."""
    block = tl.program_id(1)
    part, first, before = _part(block, heads, groups, ROWS)
    n = tl.where((part == Q) | (part == GATE), heads, groups)
    eps = tl.full([], eps, tl.float32)
    column, partner, index, sign = _partners(D2, R)
    head = first + tl.arange(0, ROWS)
    mask = (head < n)[:, None] & (column < D)[None, :]
    row = head[:, None] * D
    weight, grad = q_weight, dq
    if part == K:
        weight, grad = k_weight, dk
    if part == V:
        grad = dv
    if part == GATE:
        grad = dgate
    stride_s = tl.where(part == Q, dq_s, tl.where(part == K, dk_s, tl.where(part == V, dv_s, dg_s)))
    stride_b = tl.where(part == Q, dq_b, tl.where(part == K, dk_b, tl.where(part == V, dv_b, dg_b)))
    stride_h = tl.where(part == Q, dq_h, tl.where(part == K, dk_h, tl.where(part == V, dv_h, D)))
    w = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([ROWS, D2], tl.float32)
    token = tl.program_id(0).to(tl.int64)
    for _ in range(tl.program_id(0), tokens, tl.num_programs(0)):
        at = token * width + before * D + row + column[None, :]
        g_at = grad + token // B * stride_s + token % B * stride_b + head[:, None] * stride_h
        raw = tl.load(g_at + column[None, :], mask=mask, other=0.0)
        if part >= V:
            tl.store(dpacked + at, raw, mask=mask)
        else:
            g = raw.to(tl.float32)
            if R > 0:
                cos, sin = _angles(angles + token // tokens_per_angles * R, index, R, D2)
                other = tl.load(g_at + partner[None, :], mask=mask, other=0.0).to(tl.float32)
                g = g * cos[None, :] - other * (sign * sin)[None, :]
            x = tl.load(packed + at, mask=mask, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
            x = x * scale
            sums += g * x
            g = g * w
            dx = scale * (g - x * (tl.sum(g * x, 1) / D)[:, None])
            tl.store(dpacked + at, dx.to(dpacked.dtype.element_ty), mask=mask)
        token += tl.num_programs(0)
    if part < V:
        blocks = tl.cdiv(heads, ROWS) + tl.cdiv(groups, ROWS)
        tl.store(dweights + (tl.program_id(0) * blocks + block) * D + column, tl.sum(sums, 0), mask=column < D)
