"""Forward kernel of `conv_gates`: reads every used element of the packed projection once and writes q, k, v, g and beta.

A program takes S segments of L tokens and one unit: a head of q, a head of k, a tile of v's channels, or all gates. In each step
it processes one token of every segment. It keeps the last three inputs in registers.
"""

import triton
import triton.language as tl

from hybrid_kernels.conv_gates.backends.triton.rows import L2_EPS, add_products, row_tiles, seen, tap_tiles, zero_rows
from hybrid_kernels.triton_support import even_width, sigmoid


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _channels(
    x, out, weight, positions, T, stride, out_stride, first,
    DIM: tl.constexpr, NORM: tl.constexpr, DOCUMENTS: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    t = (first + tl.arange(0, S) * L).to(tl.int64)
    x1 = row_tiles(x, t - 1, (t >= 1) & (t <= T), stride, DIM)
    x2 = row_tiles(x, t - 2, (t >= 2) & (t <= T), stride, DIM)
    x3 = row_tiles(x, t - 3, (t >= 3) & (t <= T), stride, DIM)
    w0, w1 = tap_tiles(weight, 0, DIM), tap_tiles(weight, 1, DIM)
    w2, w3 = tap_tiles(weight, 2, DIM), tap_tiles(weight, 3, DIM)
    nothing = zero_rows(S, DIM)
    next_x = row_tiles(x, t, t < T, stride, DIM)
    next_position = tl.zeros([S], tl.int32)
    if DOCUMENTS:
        next_position = tl.load(positions + t, mask=t < T, other=0)
    for step in range(L):
        x0 = next_x
        next_x = row_tiles(x, t + 1, (t + 1 < T) & (step < L - 1), stride, DIM)
        position = next_position
        if DOCUMENTS:
            next_position = tl.load(positions + t + 1, mask=t + 1 < T, other=0)
        y = add_products(nothing, w3, seen(x0, position, 0, DOCUMENTS, DIM), DIM)
        y = add_products(y, w2, seen(x1, position, 1, DOCUMENTS, DIM), DIM)
        y = add_products(y, w1, seen(x2, position, 2, DOCUMENTS, DIM), DIM)
        y = add_products(y, w0, seen(x3, position, 3, DOCUMENTS, DIM), DIM)
        square = tl.zeros([S], tl.float32)
        active = ()
        for i in tl.static_range(DIM // even_width(DIM)):
            s = y[i] * sigmoid(y[i])
            active = active + (s,)
            if NORM:
                square += tl.sum(s * s, 1)
        for i in tl.static_range(DIM // even_width(DIM)):
            s = active[i]
            if NORM:
                s = s * tl.rsqrt(square + L2_EPS)[:, None]
            cols = even_width(DIM) * i + tl.arange(0, even_width(DIM))
            at = out + t[:, None] * out_stride + cols[None, :]
            tl.store(at, s.to(out.dtype.element_ty), mask=(t < T)[:, None])
        x3, x2, x1 = x2, x1, x0
        t += 1


@triton.jit
def _gates(
    raw, A_log, dt_bias, g, beta, t, T, stride, beta_max,
    HV: tl.constexpr, HEADS_POW2: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS_POW2)
    mask = (t < T)[:, None] & (head < HV)[None, :]
    at = t[:, None] * stride + head[None, :]
    b = tl.load(raw + at, mask=mask, other=0.0).to(tl.float32)
    to = t[:, None] * HV + head[None, :]
    if DECAY:
        a = tl.load(raw + at + HV, mask=mask, other=0.0).to(tl.float32)
        A = tl.exp(tl.load(A_log + head, mask=head < HV, other=0.0).to(tl.float32))
        dt = tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)
        tl.store(g + to, -A[None, :] * softplus(a + dt[None, :]), mask=mask)
    tl.store(beta + to, sigmoid(b) * beta_max, mask=mask)


@triton.jit
def conv_gates_kernel(
    packed, weight, A_log, dt_bias, positions, q, k, v, g, beta, T, B, beta_max,
    W: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VT: tl.constexpr,
    GATE: tl.constexpr, GT: tl.constexpr, DECAY: tl.constexpr, HEADS_POW2: tl.constexpr,
    DOCUMENTS: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    unit, i_b = tl.program_id(0), tl.program_id(2)
    first = tl.program_id(1) * S * L
    x, row = packed + i_b * W, i_b.to(tl.int64) * T
    positions += row
    if unit < 2 * HK:
        out = q + row * (HK * K) + unit * K
        if unit >= HK:
            out = k + row * (HK * K) + (unit - HK) * K
        at = unit * K
        _channels(x + at, out, weight + at * 4, positions, T, B * W, HK * K, first, K, True, DOCUMENTS, S, L)
    elif unit < 2 * HK + HV * V // VT:
        tile = (unit - 2 * HK) * VT
        at = 2 * HK * K + tile
        out = v + row * (HV * V) + tile
        _channels(x + at, out, weight + at * 4, positions, T, B * W, HV * V, first, VT, False, DOCUMENTS, S, L)
    else:
        raw = x + 2 * HK * K + HV * V + GATE
        for block in range(S * L // 16):
            t = (first + block * 16 + tl.arange(0, 16)).to(tl.int64)
            _gates(raw, A_log, dt_bias, g + row * HV, beta + row * HV, t, T, B * W, beta_max, HV, HEADS_POW2, DECAY)
