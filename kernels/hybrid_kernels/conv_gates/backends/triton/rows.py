"""Functions of both directions on rows of S tokens, one per segment of a program, as tuples of equal tiles."""

import triton
import triton.language as tl

from hybrid_kernels.triton_support import even_width, widen

L2_EPS = tl.constexpr(1e-6)
AHEAD = tl.constexpr(4)
"""Rows whose loads are on their way while a row is processed. Loops are unrolled by it, so that no register moves."""


@triton.jit
def zero_rows(S: tl.constexpr, DIM: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(DIM // even_width(DIM)):
        tiles = tiles + (tl.zeros([S, even_width(DIM)], tl.float32),)
    return tiles


@triton.jit
def row_tiles(base, t, valid, stride, DIM: tl.constexpr):
    """Load the rows of tokens t (int32) in their own dtype, zero where they are not valid."""
    tiles = ()
    row = base + t.to(tl.int64)[:, None] * stride
    for i in tl.static_range(DIM // even_width(DIM)):
        cols = even_width(DIM) * i + tl.arange(0, even_width(DIM))
        tiles = tiles + (tl.load(row + cols[None, :], mask=valid[:, None], other=0.0),)
    return tiles


@triton.jit
def rows_ahead(base, t, end, stride, DIM: tl.constexpr):
    """Load the rows of tokens t, t + 1, ..., of which those from `end` on are zero."""
    rows = ()
    for i in tl.static_range(AHEAD):
        rows = rows + (row_tiles(base, t + i, t + i < end, stride, DIM),)
    return rows


@triton.jit
def store_rows(base, t, valid, stride, tiles, DIM: tl.constexpr):
    row = base + t.to(tl.int64)[:, None] * stride
    for i in tl.static_range(DIM // even_width(DIM)):
        cols = even_width(DIM) * i + tl.arange(0, even_width(DIM))
        tl.store(row + cols[None, :], tiles[i].to(base.dtype.element_ty), mask=valid[:, None])


@triton.jit
def position_of(positions, t, T, DOCUMENTS: tl.constexpr):
    """Load the positions of tokens t in their documents. Without documents they do not matter."""
    if DOCUMENTS:
        return tl.load(positions + t, mask=t < T, other=0)
    else:
        return t


@triton.jit
def taps(weight, DIM: tl.constexpr):
    """Return the tiles of the weights of the token itself and of those 1, 2 and 3 tokens ago."""
    return tap_tiles(weight, 3, DIM), tap_tiles(weight, 2, DIM), tap_tiles(weight, 1, DIM), tap_tiles(weight, 0, DIM)


@triton.jit
def tap_tiles(weight, tap: tl.constexpr, DIM: tl.constexpr):
    tiles = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        cols = even_width(DIM) * i + tl.arange(0, even_width(DIM))
        tiles = tiles + (tl.load(weight + cols * 4 + tap).to(tl.float32)[None, :],)
    return tiles


@triton.jit
def past_rows(x, t, T, position, stride, DOCUMENTS: tl.constexpr, DIM: tl.constexpr):
    """Load the rows 1, 2 and 3 tokens before t in fp32, zero where they belong to another document."""
    x1 = in_fp32(row_tiles(x, t - 1, (t >= 1) & (t <= T), stride, DIM), DIM)
    x2 = in_fp32(row_tiles(x, t - 2, (t >= 2) & (t <= T), stride, DIM), DIM)
    x3 = in_fp32(row_tiles(x, t - 3, (t >= 3) & (t <= T), stride, DIM), DIM)
    return (
        seen(x1, position, 1, DOCUMENTS, DIM),
        seen(x2, position, 2, DOCUMENTS, DIM),
        seen(x3, position, 3, DOCUMENTS, DIM),
    )


@triton.jit
def where(condition, tiles, DIM: tl.constexpr):
    """Return tiles, or zeros unless the condition, a scalar, holds."""
    out = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        out = out + (tl.where(condition, tiles[i], 0.0),)
    return out


@triton.jit
def next_rows(row, past, position, DOCUMENTS: tl.constexpr, DIM: tl.constexpr):
    """Return the row of a token in fp32 and those of the three before, which become zero where a document begins."""
    return (
        in_fp32(row, DIM),
        seen(past[0], position, 1, DOCUMENTS, DIM),
        seen(past[1], position, 1, DOCUMENTS, DIM),
        seen(past[2], position, 1, DOCUMENTS, DIM),
    )


@triton.jit
def in_fp32(tiles, DIM: tl.constexpr):
    out = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        out = out + (widen(tiles[i]),)
    return out


@triton.jit
def seen(tiles, position, back: tl.constexpr, DOCUMENTS: tl.constexpr, DIM: tl.constexpr):
    """Return tiles, zero where the token `back` tokens ago belongs to another document."""
    if not DOCUMENTS:
        return tiles
    else:
        out = ()
        for i in tl.static_range(DIM // even_width(DIM)):
            out = out + (tl.where((position >= back)[:, None], tiles[i], 0.0),)
        return out


@triton.jit
def convolved(x, w, DIM: tl.constexpr):
    y = products(x[0], w[0], DIM)
    y = add_products(y, w[1], x[1], DIM)
    y = add_products(y, w[2], x[2], DIM)
    return add_products(y, w[3], x[3], DIM)


@triton.jit
def products(y, x, DIM: tl.constexpr):
    out = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        out = out + (y[i] * x[i],)
    return out


@triton.jit
def add_products(into, y, x, DIM: tl.constexpr):
    out = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        out = out + (into[i] + y[i] * x[i],)
    return out


@triton.jit
def sum_of_products(y, x, DIM: tl.constexpr):
    """Return sum(y * x) over the channels, in one reduction for all tiles."""
    total = y[0] * x[0]
    for i in tl.static_range(1, DIM // even_width(DIM)):
        total += y[i] * x[i]
    return tl.sum(total, 1)
