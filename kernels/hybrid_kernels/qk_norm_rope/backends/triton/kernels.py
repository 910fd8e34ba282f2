"""Kernels of `qk_norm_rope`, one for each direction. A program takes q, k or v of a token, with all heads as [heads, d / 2] halves.

A rank that holds all heads launches a kernel once (ALONE). Ranks that share the heads launch its first half (SUMS), which writes
one number per token for q and one for k, all-reduce them, and launch the second half (REST).
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_support import INTERPRETED

ALONE, SUMS, REST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _cos_sin(angles):
    """Return cosine and sine within 1e-6, by the hardware's approximations on the angles modulo whole turns."""
    if INTERPRETED:
        return tl.cos(angles), tl.sin(angles)
    else:
        turns = tl.floor(angles * 0.15915494309189535 + 0.5)
        angles = tl.fma(turns, -6.2831854820251465, angles)  # the fp32 nearest to 2 pi, then its excess
        angles = tl.fma(turns, 1.7484556000744883e-7, angles)
        return tl.inline_asm_elementwise(
            "cos.approx.ftz.f32 $0, $2; sin.approx.ftz.f32 $1, $2;", "=&f,=f,f", [angles],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _turn(low, high, angles, D: tl.constexpr, HALF2: tl.constexpr, BACK: tl.constexpr):
    """Rotate pairs (low, high) by a token's angles, or back."""
    column = tl.arange(0, HALF2)
    cos, sin = _cos_sin(tl.load(angles + column, mask=column < D // 2, other=0.0).to(tl.float32)[None, :])
    if BACK:
        sin = -sin
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _places(n, stride, HEADS2: tl.constexpr, D: tl.constexpr, HALF2: tl.constexpr):
    """Return offsets of the low halves of n heads, `stride` apart, and the mask of entries that are not padding of [HEADS2, HALF2]."""
    head, column = tl.arange(0, HEADS2)[:, None], tl.arange(0, HALF2)[None, :]
    return head * stride + column, (head < n) & (column < D // 2)


@triton.jit
def _load(x, at, mask, D: tl.constexpr):
    low = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    return low, tl.load(x + at + D // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, at, mask, low, high, D: tl.constexpr):
    tl.store(x + at, low.to(x.dtype.element_ty), mask=mask)
    tl.store(x + at + D // 2, high.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def forward_kernel(
    qkv, q_weight, k_weight, angles, squares, q, k, v, tokens_per_angles, heads, groups, q_width, k_width, eps,
    HEADS2: tl.constexpr, D: tl.constexpr, HALF2: tl.constexpr, ROTARY: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Write q, k and v. squares [tokens, 2] are the sums of squares of q and k: written here, or read by REST."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.where(part == 0, heads, groups)
    eps = tl.full([], eps, tl.float32)  # torch.compile passes Python's floats as fp64
    x = qkv + (token * (heads + 2 * groups) + tl.minimum(part, 1) * heads + tl.maximum(part - 1, 0) * groups) * D
    at, mask = _places(n, D, HEADS2, D, HALF2)
    low, high = _load(x, at, mask, D)
    if part == 2:
        _store(v + token * groups * D, at, mask, low, high, D)
    else:
        weight, out = q_weight, q
        if part == 1:
            weight, out = k_weight, k
        square_at = squares + 2 * token + part
        if PHASE == REST:
            square = tl.load(square_at)
        else:
            square = _sum(low * low + high * high)
            tl.store(square_at, square)
        if PHASE != SUMS:
            scale = tl.rsqrt(square / tl.where(part == 0, q_width, k_width) + eps)
            w_low, w_high = _load(weight, at, mask, D)
            low, high = low * scale * w_low, high * scale * w_high
            if ROTARY:
                low, high = _turn(low, high, angles + token // tokens_per_angles * D, D, HALF2, False)
            _store(out + token * n * D, at, mask, low, high, D)


@triton.jit
def backward_kernel(
    qkv, q_weight, k_weight, angles, squares, dq, dk, dv, along, dqkv, dweights, tokens, B, tokens_per_angles, heads, groups,
    dq_s, dq_b, dq_h, dk_s, dk_b, dk_h, dv_s, dv_b, dv_h, q_width, k_width, eps,
    HEADS2: tl.constexpr, D: tl.constexpr, HALF2: tl.constexpr, ROTARY: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """Write dqkv, and in dweights [programs, heads + groups, D] the sum over this program's tokens.

    along [tokens, 2] are the components of the gradients along normalised q and k: written by SUMS, read summed by REST.
    """
    eps = tl.full([], eps, tl.float32)
    part = tl.program_id(1)
    n = tl.where(part == 0, heads, groups)
    offset = (tl.minimum(part, 1) * heads + tl.maximum(part - 1, 0) * groups) * D
    at, mask = _places(n, D, HEADS2, D, HALF2)
    weight, grad = q_weight, dq
    if part == 1:
        weight, grad = k_weight, dk
    if part == 2:
        grad = dv
    stride_s = tl.where(part == 0, dq_s, tl.where(part == 1, dk_s, dv_s))
    stride_b = tl.where(part == 0, dq_b, tl.where(part == 1, dk_b, dv_b))
    stride_h = tl.where(part == 0, dq_h, tl.where(part == 1, dk_h, dv_h))
    grad_at, _ = _places(n, stride_h, HEADS2, D, HALF2)
    width = tl.where(part == 0, q_width, k_width)
    if part < 2:
        w_low, w_high = _load(weight, at, mask, D)
    else:
        w_low = tl.zeros([HEADS2, HALF2], tl.float32)
        w_high = w_low
    dw_low, dw_high = tl.zeros([HEADS2, HALF2], tl.float32), tl.zeros([HEADS2, HALF2], tl.float32)
    token = tl.program_id(0).to(tl.int64)
    for _ in range(tl.program_id(0), tokens, tl.num_programs(0)):
        row = token * (heads + 2 * groups) * D + offset
        g_low, g_high = _load(grad + token // B * stride_s + token % B * stride_b, grad_at, mask, D)
        if part == 2:
            _store(dqkv + row, at, mask, g_low, g_high, D)
        else:
            low, high = _load(qkv + row, at, mask, D)
            scale = tl.rsqrt(tl.load(squares + 2 * token + part) / width + eps)
            low, high = low * scale, high * scale
            if ROTARY:
                g_low, g_high = _turn(g_low, g_high, angles + token // tokens_per_angles * D, D, HALF2, True)
            if PHASE == REST:
                onto = tl.load(along + 2 * token + part)
            else:
                onto = _sum(low * g_low * w_low + high * g_high * w_high)
            if PHASE == SUMS:
                tl.store(along + 2 * token + part, onto)
            else:
                dw_low += g_low * low
                dw_high += g_high * high
                d_low = scale * (g_low * w_low - low * (onto / width))
                d_high = scale * (g_high * w_high - high * (onto / width))
                _store(dqkv + row, at, mask, d_low, d_high, D)
        token += tl.num_programs(0)
    if PHASE != SUMS and part < 2:
        _store(dweights + tl.program_id(0) * (heads + groups) * D + offset, at, mask, dw_low, dw_high, D)
