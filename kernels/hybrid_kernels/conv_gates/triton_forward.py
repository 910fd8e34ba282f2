"""conv_gates forward: one kernel that reads every used element of the packed projection once and writes q, k, v, g, beta.

A program takes 32 tokens and one unit: a head of q, a head of k, a tile of v's channels, or all the gates.
"""

import triton
import triton.language as tl

from ..triton_support import tile_count, tile_width

L2_EPS = tl.constexpr(1e-6)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def conv_tile(x, weight, t, cols, position, T, stride, VARLEN: tl.constexpr):
    """Four causal taps over x [T, ...] (rows `stride` apart) for tokens t and channels cols: [t, cols] in fp32."""
    y = tl.zeros([t.shape[0], cols.shape[0]], tl.float32)
    for back in tl.static_range(4):
        valid = (t >= back) & (t < T)
        if VARLEN:
            valid = valid & (position >= back)
        x_t = tl.load(x + (t - back)[:, None] * stride + cols[None, :], mask=valid[:, None], other=0.0)
        y += x_t.to(tl.float32) * tl.load(weight + cols * 4 + (3 - back)).to(tl.float32)[None, :]
    return y


@triton.jit
def conv_gates_kernel(
    packed, weight, A_log, dt_bias, positions, q, k, v, g, beta, T, B, beta_max,
    W: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VT: tl.constexpr,
    HEADS_POW2: tl.constexpr, VARLEN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    unit, i_b = tl.program_id(0), tl.program_id(2)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    in_row = t < T
    position = t
    if VARLEN:
        position = tl.load(positions + t, mask=in_row, other=0)
    stride = B * W
    t64 = t.to(tl.int64)
    row = packed + i_b * W
    token = i_b.to(tl.int64) * T + t64
    if unit < 2 * HK:
        out, head, at = q, unit, unit * K
        if unit >= HK:
            out, head = k, unit - HK
        tiles = ()
        square = tl.zeros([BT], tl.float32)
        for i in tl.static_range(tile_count(K)):
            cols = 64 * i + tl.arange(0, tile_width(K, i))
            y = conv_tile(row + at, weight + at * 4, t64, cols, position, T, stride, VARLEN)
            y = y * tl.sigmoid(y)
            square += tl.sum(y * y, 1)
            tiles = tiles + (y,)
        norm = tl.rsqrt(square + L2_EPS)[:, None]
        for i in tl.static_range(tile_count(K)):
            cols = 64 * i + tl.arange(0, tile_width(K, i))
            to = out + token[:, None] * (HK * K) + head * K + cols[None, :]
            tl.store(to, (tiles[i] * norm).to(out.dtype.element_ty), mask=in_row[:, None])
    elif unit < 2 * HK + HV * V // VT:
        at = (unit - 2 * HK) * VT
        cols = tl.arange(0, VT)
        first = 2 * HK * K + at
        y = conv_tile(row + first, weight + first * 4, t64, cols, position, T, stride, VARLEN)
        y = y * tl.sigmoid(y)
        to = v + token[:, None] * (HV * V) + at + cols[None, :]
        tl.store(to, y.to(v.dtype.element_ty), mask=in_row[:, None])
    else:
        head = tl.arange(0, HEADS_POW2)
        mask = in_row[:, None] & (head < HV)[None, :]
        raw = row + t64[:, None] * stride + (2 * HK * K + 2 * HV * V) + head[None, :]
        b = tl.load(raw, mask=mask, other=0.0).to(tl.float32)
        a = tl.load(raw + HV, mask=mask, other=0.0).to(tl.float32)
        A = tl.exp(tl.load(A_log + head, mask=head < HV, other=0.0).to(tl.float32))
        dt = tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)
        to = token[:, None] * HV + head[None, :]
        tl.store(g + to, -A[None, :] * softplus(a + dt[None, :]), mask=mask)
        tl.store(beta + to, tl.sigmoid(b) * beta_max, mask=mask)
