"""Backward kernel of `conv_gates`: recomputes what it needs from the packed input.

As in the forward kernel, a program processes one token of each of its S segments of L tokens per step. It keeps in registers the
last three inputs and the input gradients that later tokens still add to. So it reads and computes each element once, except for
three tokens per segment, although the convolution couples four tokens in both directions.
"""

import triton
import triton.language as tl

from hybrid_kernels.conv_gates.backends.triton.rows import L2_EPS, add_products, row_tiles, seen, tap_tiles, zero_rows
from hybrid_kernels.triton_support import even_width, load_tiles, sigmoid, store_tiles, zero_tiles


@triton.jit
def _pre_activation_gradient(y, d, NORM: tl.constexpr, DIM: tl.constexpr):
    """Return the gradient of the convolution's output y, from the gradient d of SiLU(y) or of its L2 norm."""
    if NORM:
        square = tl.zeros([y[0].shape[0]], tl.float32)
        along = tl.zeros([y[0].shape[0]], tl.float32)
        for i in tl.static_range(DIM // even_width(DIM)):
            s = y[i] * sigmoid(y[i])
            square += tl.sum(s * s, 1)
            along += tl.sum(s * d[i].to(tl.float32), 1)
        norm = tl.rsqrt(square + L2_EPS)
        along = along * norm * norm
    out = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        gate = sigmoid(y[i])
        ds = d[i].to(tl.float32)
        if NORM:
            ds = (ds - y[i] * gate * along[:, None]) * norm[:, None]
        out = out + (ds * gate * (1.0 + y[i] * (1.0 - gate)),)
    return out


@triton.jit
def _channels(
    x, dx, dout, weight, dweight, positions, T, stride, out_stride, first,
    DIM: tl.constexpr, NORM: tl.constexpr, DOCUMENTS: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    t = (first + tl.arange(0, S) * L).to(tl.int64)
    x1 = row_tiles(x, t - 1, (t >= 1) & (t <= T), stride, DIM)
    x2 = row_tiles(x, t - 2, (t >= 2) & (t <= T), stride, DIM)
    x3 = row_tiles(x, t - 3, (t >= 3) & (t <= T), stride, DIM)
    w0, w1, w2, w3 = (
        tap_tiles(weight, 0, DIM), tap_tiles(weight, 1, DIM), tap_tiles(weight, 2, DIM), tap_tiles(weight, 3, DIM)
    )  # fmt: skip
    dw0, dw1, dw2, dw3 = zero_rows(S, DIM), zero_rows(S, DIM), zero_rows(S, DIM), zero_rows(S, DIM)
    due1, due2, due3 = zero_rows(S, DIM), zero_rows(S, DIM), zero_rows(S, DIM)  # partial dx of 1, 2, 3 tokens ago
    nothing = zero_rows(S, DIM)
    next_x = row_tiles(x, t, t < T, stride, DIM)
    next_d = row_tiles(dout, t, t < T, out_stride, DIM)
    next_position = tl.zeros([S], tl.int32)
    if DOCUMENTS:
        next_position = tl.load(positions + t, mask=t < T, other=0)
    for step in range(L + 3):
        x0, d = next_x, next_d
        ahead = (t + 1 < T) & (step < L + 2)
        next_x = row_tiles(x, t + 1, ahead, stride, DIM)
        next_d = row_tiles(dout, t + 1, ahead, out_stride, DIM)
        position = next_position
        if DOCUMENTS:
            next_position = tl.load(positions + t + 1, mask=t + 1 < T, other=0)
        s0, s1 = seen(x0, position, 0, DOCUMENTS, DIM), seen(x1, position, 1, DOCUMENTS, DIM)
        s2, s3 = seen(x2, position, 2, DOCUMENTS, DIM), seen(x3, position, 3, DOCUMENTS, DIM)
        y = add_products(
            add_products(add_products(add_products(nothing, w3, s0, DIM), w2, s1, DIM), w1, s2, DIM), w0, s3, DIM
        )
        dy = _pre_activation_gradient(y, d, NORM, DIM)
        if step < L:  # the next segment counts the three tokens past this one
            dw3, dw2 = add_products(dw3, dy, s0, DIM), add_products(dw2, dy, s1, DIM)
            dw1, dw0 = add_products(dw1, dy, s2, DIM), add_products(dw0, dy, s3, DIM)
        dy1, dy2 = seen(dy, position, 1, DOCUMENTS, DIM), seen(dy, position, 2, DOCUMENTS, DIM)
        done = add_products(due3, w0, seen(dy, position, 3, DOCUMENTS, DIM), DIM)
        due3, due2, due1 = (
            add_products(due2, w1, dy2, DIM),
            add_products(due1, w2, dy1, DIM),
            add_products(nothing, w3, dy, DIM),
        )
        ready = (t - 3 < T) & (step >= 3)
        for i in tl.static_range(DIM // even_width(DIM)):
            cols = even_width(DIM) * i + tl.arange(0, even_width(DIM))
            at = dx + (t - 3)[:, None] * stride + cols[None, :]
            tl.store(at, done[i].to(dx.dtype.element_ty), mask=ready[:, None])
        x3, x2, x1 = x2, x1, x0
        t += 1
    for i in tl.static_range(DIM // even_width(DIM)):
        cols = even_width(DIM) * i + tl.arange(0, even_width(DIM))
        tl.store(dweight + cols * 4 + 0, tl.sum(dw0[i], 0))
        tl.store(dweight + cols * 4 + 1, tl.sum(dw1[i], 0))
        tl.store(dweight + cols * 4 + 2, tl.sum(dw2[i], 0))
        tl.store(dweight + cols * 4 + 3, tl.sum(dw3[i], 0))


@triton.jit
def _rows_of_gate(
    dgate, dx, first, T, gate_stride, stride, WITH_GATE: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr
):
    """Store the gate's gradient, or zeros, in the gate's columns."""
    for block in range(TOKENS // 32):
        t = (first + block * 32 + tl.arange(0, 32)).to(tl.int64)
        if WITH_GATE:
            rows = load_tiles(dgate, t, t < T, gate_stride, DIM)
        else:
            rows = zero_tiles(32, DIM)
        store_tiles(dx, t, t < T, stride, rows, DIM)


@triton.jit
def _gates(
    raw, draw, A_log, dt_bias, dg, dbeta, sums, first, T, stride, beta_max,
    HV: tl.constexpr, HEADS_POW2: tl.constexpr, DECAY: tl.constexpr, PADDING: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of b and a (at raw and raw + HV), zeros in the padding, and this program's part of dA_log and ddt_bias."""
    head = tl.arange(0, HEADS_POW2)
    padding_at: tl.constexpr = 2 * HV if DECAY else HV
    if DECAY:
        A = tl.exp(tl.load(A_log + head, mask=head < HV, other=0.0).to(tl.float32))[None, :]
        dt = tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)[None, :]
    dA, ddt = tl.zeros([HEADS_POW2], tl.float32), tl.zeros([HEADS_POW2], tl.float32)
    for block in range(TOKENS // 16):
        t = (first + block * 16 + tl.arange(0, 16)).to(tl.int64)
        mask = (t < T)[:, None] & (head < HV)[None, :]
        at = t[:, None] * stride + head[None, :]
        b = tl.load(raw + at, mask=mask, other=0.0).to(tl.float32)
        db_t = tl.load(dbeta + t[:, None] * HV + head[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = sigmoid(b)
        tl.store(draw + at, (db_t * beta_max * gate * (1.0 - gate)).to(draw.dtype.element_ty), mask=mask)
        if PADDING > 0:
            col = tl.arange(0, triton.next_power_of_2(PADDING))
            rest = draw + t[:, None] * stride + padding_at + col[None, :]
            tl.store(rest, 0.0, mask=(t < T)[:, None] & (col < PADDING)[None, :])
        if DECAY:
            x = tl.load(raw + at + HV, mask=mask, other=0.0).to(tl.float32) + dt
            dg_t = tl.load(dg + t[:, None] * HV + head[None, :], mask=mask, other=0.0).to(tl.float32)
            dx = -dg_t * A * sigmoid(x)
            tl.store(draw + at + HV, dx.to(draw.dtype.element_ty), mask=mask)
            softplus = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
            dA += tl.sum(-dg_t * A * softplus, 0)
            ddt += tl.sum(dx, 0)
    if DECAY:
        tl.store(sums + head, dA, mask=head < HV)
        tl.store(sums + HV + head, ddt, mask=head < HV)


@triton.jit
def conv_gates_backward_kernel(
    packed, weight, A_log, dt_bias, positions, dq, dk, dv, dg, dbeta, dgate, dpacked, dweight, sums, T, B, beta_max,
    W: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VT: tl.constexpr,
    GATE: tl.constexpr, GT: tl.constexpr, DECAY: tl.constexpr, HEADS_POW2: tl.constexpr,
    DOCUMENTS: tl.constexpr, WITH_GATE: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    unit, i_t, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    part = (i_b * tl.num_programs(1) + i_t).to(tl.int64)
    first = i_t * S * L
    x, dx = packed + i_b * W, dpacked + i_b * W
    row = i_b.to(tl.int64) * T
    positions += row
    dweight += part * (2 * HK * K + HV * V) * 4
    if unit < 2 * HK:
        at = unit * K
        dout = dq + row * HK * K + unit * K
        if unit >= HK:
            dout = dk + row * HK * K + (unit - HK) * K
        _channels(
            x + at, dx + at, dout, weight + at * 4, dweight + at * 4, positions, T, B * W, HK * K, first,
            K, True, DOCUMENTS, S, L,
        )  # fmt: skip
    elif unit < 2 * HK + HV * V // VT:
        tile = (unit - 2 * HK) * VT
        at = 2 * HK * K + tile
        _channels(
            x + at, dx + at, dv + row * HV * V + tile, weight + at * 4, dweight + at * 4, positions, T, B * W, HV * V,
            first, VT, False, DOCUMENTS, S, L,
        )  # fmt: skip
    elif unit < 2 * HK + HV * V // VT + GATE // GT:
        tile = (unit - 2 * HK - HV * V // VT) * GT
        at = 2 * HK * K + HV * V + tile
        _rows_of_gate(
            dgate + i_b * GATE + tile, dx + at, first, T, B * GATE, B * W, WITH_GATE, GT, S * L
        )  # fmt: skip
    else:
        at: tl.constexpr = 2 * HK * K + HV * V + GATE
        _gates(
            x + at, dx + at, A_log, dt_bias, dg + row * HV, dbeta + row * HV, sums + part * 2 * HV, first, T, B * W,
            beta_max, HV, HEADS_POW2, DECAY, W - at - (2 * HV if DECAY else HV), S * L,
        )  # fmt: skip
