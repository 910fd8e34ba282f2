"""Parts of the scans in Gluon: layouts, copies of tiles with barriers, a state in registers, and its GEMMs.

A tile of K columns is a tuple of boxes of 64 columns and the remainder: 96 is 64 and 32.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hybrid_kernels.triton_support import tile_count, tile_width


@gluon.constexpr_function
def mma(width):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16])


@gluon.constexpr_function
def operand(width):
    return gl.DotOperandLayout(operand_index=0, parent=mma(width), k_width=2)


@gluon.constexpr_function
def shared(width):
    return gl.NVMMASharedLayout.get_default_for([64, width], gl.bfloat16)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _bf16_now(x):
    """x in bf16, kept before the products that follow: moved among them, it makes the assembler wait for each."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=False, pack=2
    )


@gluon.jit
def half_rows(x):
    """`half_rows` of triton_support, as a left operand."""
    power = gl.max(gl.abs(x), axis=1).to(gl.int32, bitcast=True) & 0x7F800000
    inverse = (0x7F000000 - power).to(gl.float32, bitcast=True)
    half = (x * inverse[:, None]).to(gl.float16)
    return gl.convert_layout(half, operand(64)), power.to(gl.float32, bitcast=True)


@gluon.jit
def new_buffers(STAGES: gl.constexpr, DIM: gl.constexpr, dtype: gl.constexpr = gl.bfloat16):
    tiles = ()
    for i in gl.static_range(tile_count(DIM)):
        tiles = tiles + (
            gl.allocate_shared_memory(dtype, [STAGES, 64, tile_width(DIM, i)], shared(tile_width(DIM, i))),
        )
    return tiles


@gluon.jit
def new_barriers(DIM: gl.constexpr):
    """A barrier for each tile and stage, each tile's of its own: the compiler synchronizes what shares memory."""
    bars = ()
    for _ in gl.static_range(tile_count(DIM)):
        bar = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for stage in gl.static_range(2):
            mbarrier.init(bar.index(stage), count=1)
        bars = bars + (bar,)
    return bars


@gluon.jit
def _expect(bars, stage, pred, DIM: gl.constexpr):
    for i in gl.static_range(tile_count(DIM)):
        mbarrier.expect(bars[i].index(stage), 128 * tile_width(DIM, i), pred=pred)


@gluon.jit
def wait_for(bars, stage, phase, DIM: gl.constexpr):
    for i in gl.static_range(tile_count(DIM)):
        mbarrier.wait(bars[i].index(stage), phase)


@gluon.jit
def _fetch(wide, narrow, row, col, buffers, bars, stage, pred, DIM: gl.constexpr):
    for i in gl.static_range(tile_count(DIM)):
        bar, to = bars[i].index(stage), buffers[i].index(stage)
        if tile_width(DIM, i) == 64:
            tma.async_copy_global_to_shared(wide, [row, col + 64 * i], bar, to, pred=pred)
        else:
            tma.async_copy_global_to_shared(narrow, [row, col + 64 * i], bar, to, pred=pred)


@gluon.jit
def put(wide, narrow, row, buffers, tiles, DIM: gl.constexpr):
    """Tiles to rows of a matrix DIM wide, through `buffers`; the caller has waited for their last store."""
    for i in gl.static_range(tile_count(DIM)):
        buffers[i].index(0).store(tiles[i])
    fence_async_shared()
    gl.thread_barrier()
    for i in gl.static_range(tile_count(DIM)):
        if tile_width(DIM, i) == 64:
            tma.async_copy_shared_to_global(wide, [row, 64 * i], buffers[i].index(0))
        else:
            tma.async_copy_shared_to_global(narrow, [row, 64 * i], buffers[i].index(0))


@gluon.jit
def put_transposed(desc, pointer, row, col, end, x, buffer, stride):
    """x [values, tokens] to rows `row`... of desc; only those before `end`. The caller has waited as for `_put`."""
    tile = buffer.permute((1, 0))
    tile.store(x)
    fence_async_shared()
    gl.thread_barrier()
    if row + 64 <= end:
        tma.async_copy_shared_to_global(desc, [row, col], buffer)
    else:
        blocked: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        t = row + gl.arange(0, 64, layout=gl.SliceLayout(1, blocked))
        at = t.to(gl.int64)[:, None] * stride + col + gl.arange(0, 64, layout=gl.SliceLayout(0, blocked))[None, :]
        gl.store(pointer + at, buffer.load(blocked), mask=(t < end)[:, None])


@gluon.jit
def carry(pointer, at, W: gl.constexpr, K: gl.constexpr, LOAD: gl.constexpr):
    """S^T from a state stored [K, W], or zero."""
    tiles = ()
    for i in gl.static_range(tile_count(K)):
        if LOAD:
            rows = gl.arange(0, 64, layout=gl.SliceLayout(1, mma(tile_width(K, i))))
            cols = 64 * i + gl.arange(0, tile_width(K, i), layout=gl.SliceLayout(0, mma(tile_width(K, i))))
            tiles = tiles + (gl.load(pointer + at + cols[None, :] * W + rows[:, None]).to(gl.float32),)
        else:
            tiles = tiles + (gl.zeros([64, tile_width(K, i)], gl.float32, layout=mma(tile_width(K, i))),)
    return tiles


@gluon.jit
def identity(row, K: gl.constexpr):
    """Rows `row` ... `row` + 64 of the identity, and of zeros before it and after."""
    tiles = ()
    for i in gl.static_range(tile_count(K)):
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, mma(tile_width(K, i))))
        cols = 64 * i + gl.arange(0, tile_width(K, i), layout=gl.SliceLayout(0, mma(tile_width(K, i))))
        tiles = tiles + (gl.where(rows[:, None] == cols[None, :], 1.0, 0.0),)
    return tiles


@gluon.jit
def uncarry(pointer, at, tiles, W: gl.constexpr, K: gl.constexpr):
    for i in gl.static_range(tile_count(K)):
        rows = gl.arange(0, 64, layout=gl.SliceLayout(1, mma(tile_width(K, i))))
        cols = 64 * i + gl.arange(0, tile_width(K, i), layout=gl.SliceLayout(0, mma(tile_width(K, i))))
        gl.store(pointer + at + cols[None, :] * W + rows[:, None], tiles[i])


@gluon.jit
def lowered(tiles, K: gl.constexpr):
    """bf16 copies of S^T's tiles, as left operands; and as they lie, to be stored."""
    operands, stored = (), ()
    for i in gl.static_range(tile_count(K)):
        x = _bf16_now(tiles[i])
        stored = stored + (x,)
        operands = operands + (gl.convert_layout(x, operand(64)),)
    return operands, stored


@gluon.jit
def against_rows(operands, buffers, stage, acc, K: gl.constexpr):
    """acc [64 values, 64 tokens] = S^T (the tiles in buffers)^T, in flight."""
    acc = warpgroup_mma(operands[0], buffers[0].index(stage).permute((1, 0)), acc, use_acc=False, is_async=True)
    for i in gl.static_range(1, tile_count(K)):
        acc = warpgroup_mma(operands[i], buffers[i].index(stage).permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def add_rows(x, buffers, stage, accs, K: gl.constexpr):
    """accs [64 values, K] += x [64 values, 64 tokens] (the tiles in buffers), in flight."""
    out = ()
    for i in gl.static_range(tile_count(K)):
        left = gl.convert_layout(x, operand(tile_width(K, i)))
        out = out + (warpgroup_mma(left, buffers[i].index(stage), accs[i], is_async=True),)
    return out


@gluon.jit
def scaled(tiles, factor, K: gl.constexpr):
    """tiles * factor; kept where it stands, as `_bf16_now`."""
    out = ()
    for i in gl.static_range(tile_count(K)):
        factors = gl.full([64, tile_width(K, i)], 1.0, gl.float32, layout=mma(tile_width(K, i))) * factor
        out = out + (
            gl.inline_asm_elementwise(
                "mul.f32 $0, $1, $2;", "=f,f,f", [tiles[i], factors], dtype=gl.float32, is_pure=False, pack=1
            ),
        )
    return out


@gluon.jit
def landed(accs, K: gl.constexpr):
    """Wait for everything in flight."""
    if tile_count(K) == 1:
        return (warpgroup_mma_wait(0, deps=(accs[0],)),)
    else:
        return warpgroup_mma_wait(0, deps=accs)


@gluon.jit
def span_of(i_n, cu, chunk_start, T, NT, segments, VARLEN: gl.constexpr):
    """`sequence_span` of triton_scan in 32 bits."""
    if VARLEN:
        start, end = gl.load(cu + i_n), gl.load(cu + i_n + 1)
        first = gl.load(chunk_start + i_n)
        count = gl.load(chunk_start + i_n + 1) - first
    else:
        row, per = i_n // segments, (NT + segments - 1) // segments
        before = i_n % segments * per
        start = row * T + before * 64
        end = (row + 1) * T
        first = row * NT + before
        count = gl.minimum(per, NT - before)
    return start, end, first, count


@gluon.jit
def fetch_chunk(
    k64, k32, q64, q32, v, A, P, k_in, q_in, v_in, a_in, p_in, k_bar, q_bar, v_bar, a_bar, p_bar,
    row, key_col, value_col, square, stage, more, K: gl.constexpr, WITH_QUERIES: gl.constexpr,
):  # fmt: skip
    """Start the copies of a chunk's tiles into `stage`, if there is such a chunk."""
    _expect(k_bar, stage, more, K)
    _expect(v_bar, stage, more, 64)
    _expect(a_bar, stage, more, 64)
    if WITH_QUERIES:
        _expect(q_bar, stage, more, K)
        _expect(p_bar, stage, more, 64)
    gl.thread_barrier()  # every warp is done with what the copies overwrite
    _fetch(k64, k32, row, key_col, k_in, k_bar, stage, more, K)
    _fetch(v, v, row, value_col, v_in, v_bar, stage, more, 64)
    _fetch(A, A, square, 0, a_in, a_bar, stage, more, 64)
    if WITH_QUERIES:
        _fetch(P, P, square, 0, p_in, p_bar, stage, more, 64)
        _fetch(q64, q32, row, key_col, q_in, q_bar, stage, more, K)


@gluon.jit
def gates_of(G, tile, more):
    """A chunk's running gate sums G [64] and the last of them, into registers."""
    t = gl.arange(0, 64, layout=gl.SliceLayout(0, mma(64)))
    at = tile.to(gl.int64) * 64
    return gl.load(G + at + t, mask=(t < 64) & more, other=0.0), gl.load(G + at + 63, mask=more, other=0.0)
