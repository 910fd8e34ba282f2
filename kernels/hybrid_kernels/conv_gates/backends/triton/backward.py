"""Backward kernel of `conv_gates`: recomputes what it needs from the packed input.

As in the forward kernel, a program processes one token of each of its S segments of L tokens per step. It keeps in registers the
last three inputs, the input gradients that later tokens still add to, and the weight's gradient. So it reads and computes each
element once, except for three tokens per segment, although the convolution couples four tokens in both directions.
"""

import triton
import triton.language as tl

from hybrid_kernels.conv_gates.backends.triton.gates import gates_backward, rows_of_gate
from hybrid_kernels.conv_gates.backends.triton.rows import (
    AHEAD,
    L2_EPS,
    add_products,
    convolved,
    in_fp32,
    next_rows,
    past_rows,
    position_of,
    products,
    row_tiles,
    rows_ahead,
    seen,
    store_rows,
    sum_of_products,
    taps,
    where,
    zero_rows,
)
from hybrid_kernels.triton_support import even_width, sigmoid, sum_over_parts


@triton.jit
def _pre_activation_gradient(y, d, NORM: tl.constexpr, DIM: tl.constexpr):
    """Return the gradient of the convolution's output y, from the gradient d of SiLU(y) or of its L2 norm."""
    gate, s = (), ()
    for i in tl.static_range(DIM // even_width(DIM)):
        gate = gate + (sigmoid(y[i]),)
        s = s + (y[i] * gate[i],)
    if NORM:
        norm = tl.rsqrt(sum_of_products(s, s, DIM) + L2_EPS)
        along = (sum_of_products(s, d, DIM) * norm * norm * norm)[:, None]
    out = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        ds = d[i]
        if NORM:
            ds = ds * norm[:, None] - s[i] * along
        out = out + (ds * (gate[i] + s[i] * (1.0 - gate[i])),)
    return out


@triton.jit
def _token(rows, d, position, w, due, NORM: tl.constexpr, DOCUMENTS: tl.constexpr, DIM: tl.constexpr):
    """Process one token of each segment.

    rows: inputs of the token and of the three before; d: gradient of its result; due: what later tokens added so far to the input
    gradients of 1, 2 and 3 tokens ago.

    Returns:
        The gradient of the token's convolution, the input gradient of 3 tokens ago, and the next `due`.
    """
    dy = _pre_activation_gradient(convolved(rows, w, DIM), d, NORM, DIM)
    dy1, dy2 = seen(dy, position, 1, DOCUMENTS, DIM), seen(dy, position, 2, DOCUMENTS, DIM)
    done = add_products(due[2], w[3], seen(dy, position, 3, DOCUMENTS, DIM), DIM)
    due = products(dy, w[0], DIM), add_products(due[0], w[1], dy1, DIM), add_products(due[1], w[2], dy2, DIM)
    return dy, done, due


@triton.jit
def _channels(
    x, dx, dout, weight, dweight, positions, T, stride, out_stride, first,
    DIM: tl.constexpr, NORM: tl.constexpr, DOCUMENTS: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    t = first + tl.arange(0, S) * L
    w = taps(weight, DIM)
    next_position = position_of(positions, t, T, DOCUMENTS)
    past = past_rows(x, t, T, next_position, stride, DOCUMENTS, DIM)
    x_ahead, d_ahead = rows_ahead(x, t, T, stride, DIM), rows_ahead(dout, t, T, out_stride, DIM)
    none = zero_rows(S, DIM)
    dw, due = (none, none, none, none), (none, none, none)
    for step in range(0, L + AHEAD, AHEAD):  # the last AHEAD tokens are the next segment's, which counts them in its dw
        for i in tl.static_range(AHEAD):
            position, next_position = next_position, position_of(positions, t + 1, T, DOCUMENTS)
            rows, d = next_rows(x_ahead[0], past, position, DOCUMENTS, DIM), in_fp32(d_ahead[0], DIM)
            more = (t + AHEAD < T) & (step + i < L - 1)
            x_ahead = x_ahead[1], x_ahead[2], x_ahead[3], row_tiles(x, t + AHEAD, more, stride, DIM)
            d_ahead = d_ahead[1], d_ahead[2], d_ahead[3], row_tiles(dout, t + AHEAD, more, out_stride, DIM)
            dy, done, due = _token(rows, d, position, w, due, NORM, DOCUMENTS, DIM)
            counted = where(step < L, dy, DIM)
            dw = (
                add_products(dw[0], counted, rows[0], DIM), add_products(dw[1], counted, rows[1], DIM),
                add_products(dw[2], counted, rows[2], DIM), add_products(dw[3], counted, rows[3], DIM),
            )  # fmt: skip
            store_rows(dx, t - 3, (t - 3 < T) & (step + i >= 3) & (step + i < L + 3), stride, done, DIM)
            past = rows[0], rows[1], rows[2]
            t += 1
    for i in tl.static_range(DIM // even_width(DIM)):
        cols = even_width(DIM) * i + tl.arange(0, even_width(DIM))
        tl.store(dweight + cols * 4 + 0, tl.sum(dw[3][i], 0))
        tl.store(dweight + cols * 4 + 1, tl.sum(dw[2][i], 0))
        tl.store(dweight + cols * 4 + 2, tl.sum(dw[1][i], 0))
        tl.store(dweight + cols * 4 + 3, tl.sum(dw[0][i], 0))


@triton.jit
def conv_gates_backward_kernel(
    packed, weight, A_log, dt_bias, positions, dq, dk, dv, dg, dbeta, dgate, dpacked, partial, T, B, beta_max,
    W: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VT: tl.constexpr,
    GATE: tl.constexpr, GT: tl.constexpr, DECAY: tl.constexpr, HEADS_POW2: tl.constexpr, ROWS: tl.constexpr,
    DOCUMENTS: tl.constexpr, WITH_GATE: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    unit, i_t, i_b = tl.program_id(0) - 1, tl.program_id(1), tl.program_id(2)
    part = (i_b * tl.num_programs(1) + i_t).to(tl.int64)
    first = i_t * S * L
    x, dx = packed + i_b * W, dpacked + i_b * W
    row = i_b.to(tl.int64) * T
    positions += row
    channels: tl.constexpr = 2 * HK * K + HV * V
    dweight = partial + part * (channels * 4 + (2 * HV if DECAY else 0))
    if unit < 0:  # first, because it takes longest
        at: tl.constexpr = channels + GATE
        gates_backward(
            x + at, dx + at, A_log, dt_bias, dg + row * HV, dbeta + row * HV, dweight + channels * 4, first, T, B * W,
            beta_max, HV, HEADS_POW2, DECAY, W - at - (2 * HV if DECAY else HV), ROWS, S * L,
        )  # fmt: skip
    elif unit < 2 * HK:
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
    else:
        tile = (unit - 2 * HK - HV * V // VT) * GT
        at = channels + tile
        rows_of_gate(
            dgate + i_b * GATE + tile, dx + at, first, T, B * GATE, B * W, WITH_GATE, GT, ROWS, S * L
        )  # fmt: skip


@triton.jit
def conv_gates_sum_kernel(
    partial, dweight, dgates, parts, N: tl.constexpr, GATES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sum partial [parts, N + GATES] over the parts: dweight [N], then dgates [GATES]."""
    column, total = sum_over_parts(partial, parts, N + GATES, ROWS, COLUMNS)
    tl.store(dweight + column, total.to(dweight.dtype.element_ty), mask=column < N)
    tl.store(dgates + column - N, total, mask=(column >= N) & (column < N + GATES))
