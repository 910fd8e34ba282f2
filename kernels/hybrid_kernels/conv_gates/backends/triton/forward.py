"""Forward kernel of `conv_gates`: reads every used element of the packed projection once and writes q, k, v, g and beta.

A program takes S segments of L tokens and one unit: a head of q, a head of k, a tile of v's channels, or all gates. In each step
it processes one token of every segment. It keeps the last three inputs in registers, and the next four are on their way.
"""

import triton
import triton.language as tl

from hybrid_kernels.conv_gates.backends.triton.gates import gates
from hybrid_kernels.conv_gates.backends.triton.rows import (
    AHEAD,
    L2_EPS,
    convolved,
    next_rows,
    past_rows,
    position_of,
    row_tiles,
    rows_ahead,
    store_rows,
    sum_of_products,
    taps,
)
from hybrid_kernels.triton_support import even_width, sigmoid


@triton.jit
def _activated(y, NORM: tl.constexpr, DIM: tl.constexpr):
    """Return SiLU(y), or its L2 norm."""
    out = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        out = out + (y[i] * sigmoid(y[i]),)
    if NORM:
        norm = tl.rsqrt(sum_of_products(out, out, DIM) + L2_EPS)[:, None]
        normed = ()
        for i in tl.static_range(DIM // even_width(DIM)):
            normed = normed + (out[i] * norm,)
        return normed
    else:
        return out


@triton.jit
def _channels(
    x, out, weight, positions, T, stride, out_stride, first,
    DIM: tl.constexpr, NORM: tl.constexpr, DOCUMENTS: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    t = first + tl.arange(0, S) * L
    end = tl.minimum(t + L, T)
    w = taps(weight, DIM)
    position = position_of(positions, t, T, DOCUMENTS)
    past = past_rows(x, t, T, position, stride, DOCUMENTS, DIM)
    ahead = rows_ahead(x, t, end, stride, DIM)
    for _ in range(L // AHEAD):
        for _ in tl.static_range(AHEAD):
            rows = next_rows(ahead[0], past, position, DOCUMENTS, DIM)
            ahead = ahead[1], ahead[2], ahead[3], row_tiles(x, t + AHEAD, t + AHEAD < end, stride, DIM)
            position = position_of(positions, t + 1, T, DOCUMENTS)
            store_rows(out, t, t < end, out_stride, _activated(convolved(rows, w, DIM), NORM, DIM), DIM)
            past = rows[0], rows[1], rows[2]
            t += 1


@triton.jit
def conv_gates_kernel(
    packed, weight, A_log, dt_bias, positions, q, k, v, g, beta, T, B, beta_max,
    W: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VT: tl.constexpr,
    GATE: tl.constexpr, GT: tl.constexpr, DECAY: tl.constexpr, HEADS_POW2: tl.constexpr, ROWS: tl.constexpr,
    DOCUMENTS: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    unit, i_b = tl.program_id(0) - 1, tl.program_id(2)
    first = tl.program_id(1) * S * L
    x, row = packed + i_b * W, i_b.to(tl.int64) * T
    positions += row
    if unit < 0:  # first, because it takes longest
        raw = x + 2 * HK * K + HV * V + GATE
        gates(
            raw, A_log, dt_bias, g + row * HV, beta + row * HV, first, T, B * W, beta_max, HV, HEADS_POW2, DECAY, ROWS, S * L
        )  # fmt: skip
    elif unit < 2 * HK:
        out = q + row * (HK * K) + unit * K
        if unit >= HK:
            out = k + row * (HK * K) + (unit - HK) * K
        at = unit * K
        _channels(x + at, out, weight + at * 4, positions, T, B * W, HK * K, first, K, True, DOCUMENTS, S, L)
    else:
        tile = (unit - 2 * HK) * VT
        at = 2 * HK * K + tile
        out = v + row * (HV * V) + tile
        _channels(x + at, out, weight + at * 4, positions, T, B * W, HV * V, first, VT, False, DOCUMENTS, S, L)
