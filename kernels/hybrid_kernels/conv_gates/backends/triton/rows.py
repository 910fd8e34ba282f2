"""Functions of both directions on rows of S tokens, one per segment of a program, as tuples of equal tiles."""

import triton
import triton.language as tl

from hybrid_kernels.triton_support import even_width

L2_EPS = tl.constexpr(1e-6)


@triton.jit
def zero_rows(S: tl.constexpr, DIM: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(DIM // even_width(DIM)):
        tiles = tiles + (tl.zeros([S, even_width(DIM)], tl.float32),)
    return tiles


@triton.jit
def row_tiles(base, t, valid, stride, DIM: tl.constexpr):
    tiles = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        cols = even_width(DIM) * i + tl.arange(0, even_width(DIM))
        tiles = tiles + (tl.load(base + t[:, None] * stride + cols[None, :], mask=valid[:, None], other=0.0),)
    return tiles


@triton.jit
def tap_tiles(weight, tap: tl.constexpr, DIM: tl.constexpr):
    tiles = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        cols = even_width(DIM) * i + tl.arange(0, even_width(DIM))
        tiles = tiles + (tl.load(weight + cols * 4 + tap).to(tl.float32)[None, :],)
    return tiles


@triton.jit
def seen(tiles, position, back: tl.constexpr, DOCUMENTS: tl.constexpr, DIM: tl.constexpr):
    """Return tiles in fp32, zero where the token `back` tokens ago belongs to another document."""
    out = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        x = tiles[i].to(tl.float32)
        if DOCUMENTS and back > 0:
            x = tl.where((position >= back)[:, None], x, 0.0)
        out = out + (x,)
    return out


@triton.jit
def add_products(into, y, x, DIM: tl.constexpr):
    out = ()
    for i in tl.static_range(DIM // even_width(DIM)):
        out = out + (into[i] + y[i] * x[i],)
    return out
