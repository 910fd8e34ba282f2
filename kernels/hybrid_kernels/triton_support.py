"""Functions that the Triton kernels share. Importing it needs the package triton.

A tensor whose last dimension is no power of two is a tuple of tiles.
"""

import triton
import triton.language as tl

from hybrid_kernels.dispatch import triton_interpreted

if triton_interpreted():
    from hybrid_kernels.triton_interpreter import repair

    repair()


@triton.constexpr_function
def tile_count(dim):
    """Return the number of tiles that cover a dimension exactly: 64 wide, the last possibly 32 or 16 (96 = 64 + 32)."""
    return (dim + 63) // 64


@triton.constexpr_function
def tile_width(dim, i):
    return min(64, dim - 64 * i)


@triton.constexpr_function
def even_width(dim):
    """Return the widest tile, up to 128, that divides a dimension. Row sums of equal tiles need no change of layout."""
    return next(w for w in (128, 64, 32, 16) if dim % w == 0)


INTERPRETED = tl.constexpr(triton_interpreted())


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e^-x) by the hardware's approximate exp2 and reciprocal (2 ulp), a third of tl.sigmoid's instructions."""
    if INTERPRETED:
        return tl.sigmoid(x)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def widen(x):
    """Return x in fp32. Two bf16 in one register take one instruction each, where Triton's conversion takes three for both."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )


@triton.jit
def exp2(x):
    """Return 2^x for x <= 0. Results below the least normal number (2^-126) become zero."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def dot_fp32(a, b):
    """Return a @ b of fp32 tensors on tensor cores, as three tf32 GEMMs of their high and low parts.

    Like input_precision="tf32x3" without its handling of NaN and infinity, which costs more than the GEMMs.
    """
    if INTERPRETED:
        return tl.dot(a, b, input_precision="ieee")
    else:
        a_high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        b_high = (b.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        out = tl.dot(a - a_high, b_high, input_precision="tf32")
        out = tl.dot(a_high, b - b_high, out, input_precision="tf32")
        return tl.dot(a_high, b_high, out, input_precision="tf32")


@triton.jit
def half_rows(x, dtype: tl.constexpr):
    """Return x [n, m] in fp16, with each row divided by a power of two, and these powers [n].

    The power brings the row's largest entry to [1, 2). fp16 has three more bits than bf16 but less range, which the powers
    restore. With fp32 as `dtype`, x is unchanged.
    """
    if dtype == tl.float32:
        return x, tl.full([x.shape[0]], 1.0, tl.float32)
    else:
        power = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
        inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)
        return (x * inverse[:, None]).to(tl.float16), power.to(tl.float32, bitcast=True)


@triton.jit
def load_tiles(base, rows, mask, stride, DIM: tl.constexpr):
    """Load base[rows, 0:DIM] as a tuple of [len(rows), tile] tensors. Rows outside `mask` are zero."""
    tiles = ()
    for i in tl.static_range(tile_count(DIM)):
        cols = 64 * i + tl.arange(0, tile_width(DIM, i))
        tiles = tiles + (tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask[:, None], other=0.0),)
    return tiles


@triton.jit
def store_tiles(base, rows, mask, stride, tiles, DIM: tl.constexpr):
    """Store tiles as `load_tiles` loads them, cast to the dtype of `base`."""
    for i in tl.static_range(tile_count(DIM)):
        cols = 64 * i + tl.arange(0, tile_width(DIM, i))
        at = base + rows[:, None] * stride + cols[None, :]
        tl.store(at, tiles[i].to(base.dtype.element_ty), mask=mask[:, None])


@triton.jit
def store_rows_in_place(base, rows, x, mask):
    """Store base[rows[i] + j] = x[i, j] (16 bits) where mask[i], directly from the registers that hold x, two values at a time.

    tl.store would first change the layout to the order of addresses, through shared memory in parts with two barriers each. In a
    loop that is faster, because four times as many stores cost more than the barriers. At the end of a program it is slower.
    """
    if INTERPRETED:
        tl.store(base + rows[:, None] + tl.arange(0, x.shape[1])[None, :], x, mask=mask[:, None])
    else:
        low, high = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True), (x.shape[0], x.shape[1] // 2, 2)))
        offsets = 2 * (rows[:, None] + 2 * tl.arange(0, x.shape[1] // 2)[None, :])
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r,r",
            [
                base.to(tl.int64) + offsets.to(tl.int64),
                low.to(tl.uint32) | high.to(tl.uint32) << 16,
                mask.to(tl.int32)[:, None],
            ],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def zero_tiles(ROWS: tl.constexpr, DIM: tl.constexpr):
    tiles = ()
    for i in tl.static_range(tile_count(DIM)):
        tiles = tiles + (tl.zeros([ROWS, tile_width(DIM, i)], tl.float32),)
    return tiles


@triton.jit
def cast_tiles(tiles, dtype: tl.constexpr, DIM: tl.constexpr):
    cast = ()
    for i in tl.static_range(tile_count(DIM)):
        cast = cast + (tiles[i].to(dtype),)
    return cast


@triton.jit
def sum_over_parts(partial, parts, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return this program's COLUMNS of partial [parts, N] and their fp32 sums over the parts, of which it adds ROWS at a time."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        at = part.to(tl.int64)[:, None] * N + column[None, :]
        total += tl.load(partial + at, mask=(part < parts)[:, None] & (column < N)[None, :], other=0.0)
    return column, tl.sum(total, 0)
