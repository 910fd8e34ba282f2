"""The two scans of triton_scan for Hopper, in Gluon: the same mathematics, with copies and products in flight by hand.

Triton's compiler waits for every product of the chain and issues its copies late. Here tiles arrive by the bulk copy
engine two chunks deep, independent products overlap, and stores leave through shared memory while the next products
run. Four warps, one warpgroup: S^T [64 values, K] and every left operand stay in registers.
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

from ..triton_support import tile_count, tile_width


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
def _half_rows(x):
    """`half_rows` of triton_support, as a left operand."""
    power = gl.max(gl.abs(x), axis=1).to(gl.int32, bitcast=True) & 0x7F800000
    inverse = (0x7F000000 - power).to(gl.float32, bitcast=True)
    half = (x * inverse[:, None]).to(gl.float16)
    return gl.convert_layout(half, operand(64)), power.to(gl.float32, bitcast=True)


@gluon.jit
def _buffers(STAGES: gl.constexpr, DIM: gl.constexpr, dtype: gl.constexpr = gl.bfloat16):
    tiles = ()
    for i in gl.static_range(tile_count(DIM)):
        tiles = tiles + (
            gl.allocate_shared_memory(dtype, [STAGES, 64, tile_width(DIM, i)], shared(tile_width(DIM, i))),
        )
    return tiles


@gluon.jit
def _barriers(DIM: gl.constexpr):
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
def _await(bars, stage, phase, DIM: gl.constexpr):
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
def _put(wide, narrow, row, buffers, tiles, DIM: gl.constexpr):
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
def _put_transposed(desc, pointer, row, col, end, x, buffer, stride):
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
def _carry(pointer, at, W: gl.constexpr, K: gl.constexpr, LOAD: gl.constexpr):
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
def _identity(row, K: gl.constexpr):
    """Rows `row` ... `row` + 64 of the identity, and of zeros before it and after."""
    tiles = ()
    for i in gl.static_range(tile_count(K)):
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, mma(tile_width(K, i))))
        cols = 64 * i + gl.arange(0, tile_width(K, i), layout=gl.SliceLayout(0, mma(tile_width(K, i))))
        tiles = tiles + (gl.where(rows[:, None] == cols[None, :], 1.0, 0.0),)
    return tiles


@gluon.jit
def _uncarry(pointer, at, tiles, W: gl.constexpr, K: gl.constexpr):
    for i in gl.static_range(tile_count(K)):
        rows = gl.arange(0, 64, layout=gl.SliceLayout(1, mma(tile_width(K, i))))
        cols = 64 * i + gl.arange(0, tile_width(K, i), layout=gl.SliceLayout(0, mma(tile_width(K, i))))
        gl.store(pointer + at + cols[None, :] * W + rows[:, None], tiles[i])


@gluon.jit
def _low(tiles, K: gl.constexpr):
    """bf16 copies of S^T's tiles, as left operands; and as they lie, to be stored."""
    operands, stored = (), ()
    for i in gl.static_range(tile_count(K)):
        x = _bf16_now(tiles[i])
        stored = stored + (x,)
        operands = operands + (gl.convert_layout(x, operand(64)),)
    return operands, stored


@gluon.jit
def _against_rows(operands, buffers, stage, acc, K: gl.constexpr):
    """acc [64 values, 64 tokens] = S^T (the tiles in buffers)^T, in flight."""
    acc = warpgroup_mma(operands[0], buffers[0].index(stage).permute((1, 0)), acc, use_acc=False, is_async=True)
    for i in gl.static_range(1, tile_count(K)):
        acc = warpgroup_mma(operands[i], buffers[i].index(stage).permute((1, 0)), acc, is_async=True)
    return acc


@gluon.jit
def _add_rows(x, buffers, stage, accs, K: gl.constexpr):
    """accs [64 values, K] += x [64 values, 64 tokens] (the tiles in buffers), in flight."""
    out = ()
    for i in gl.static_range(tile_count(K)):
        left = gl.convert_layout(x, operand(tile_width(K, i)))
        out = out + (warpgroup_mma(left, buffers[i].index(stage), accs[i], is_async=True),)
    return out


@gluon.jit
def _scaled(tiles, factor, K: gl.constexpr):
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
def _landed(accs, K: gl.constexpr):
    """Wait for everything in flight."""
    if tile_count(K) == 1:
        return (warpgroup_mma_wait(0, deps=(accs[0],)),)
    else:
        return warpgroup_mma_wait(0, deps=accs)


@gluon.jit
def _span(i_n, cu, chunk_start, T, NT, segments, VARLEN: gl.constexpr):
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
def _fetch_chunk(
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
def _gates_of(G, tile, more):
    """A chunk's running gate sums G [64] and the last of them, into registers."""
    t = gl.arange(0, 64, layout=gl.SliceLayout(0, mma(64)))
    at = tile.to(gl.int64) * 64
    return gl.load(G + at + t, mask=(t < 64) & more, other=0.0), gl.load(G + at + 63, mask=more, other=0.0)


@gluon.jit(do_not_specialize=["T", "NT", "segments"])
def forward_scan_kernel(
    q64, q32, k64, k32, v, A, P, o, states64, states32, new_values,
    G, o_pointer, initial, final, cu, chunk_start, scale, T, NT, segments,
    H: gl.constexpr, HK: gl.constexpr, K: gl.constexpr, V: gl.constexpr, VARLEN: gl.constexpr,
    WITH_INITIAL: gl.constexpr, WITH_FINAL: gl.constexpr, WITH_OUTPUT: gl.constexpr,
    WITH_STATES: gl.constexpr, WITH_TRANSITION: gl.constexpr,
):  # fmt: skip
    i_v, i_nh = gl.program_id(0), gl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    start, end, first, count = _span(i_n, cu, chunk_start, T, NT, segments, VARLEN)
    key_col, value_col = i_h // (H // HK) * K, i_h * V + i_v * 64
    if WITH_TRANSITION:
        value_col = gl.where(i_v < V // 64, value_col, H * V)  # beyond the last column: the copies bring zeros
    W: gl.constexpr = V + 64 * tile_count(K) * WITH_TRANSITION
    k_in, v_in, a_in = _buffers(2, K), _buffers(2, 64), _buffers(2, 64, gl.float16)
    k_bar, v_bar, a_bar = _barriers(K), _barriers(64), _barriers(64)
    q_in, q_bar, p_in, p_bar = k_in, k_bar, v_in, v_bar
    if WITH_OUTPUT:
        q_in, q_bar, p_in, p_bar = _buffers(2, K), _barriers(K), _buffers(2, 64), _barriers(64)
        o_out = _buffers(1, 64)
    if WITH_STATES:
        s_out, n_out = _buffers(1, K), _buffers(1, 64)
    fence_async_shared()

    if WITH_TRANSITION:
        S = _identity(i_v * 64 - V, K)
    else:
        S = _carry(initial, i_nh.to(gl.int64) * (K * V) + i_v * 64, V, K, WITH_INITIAL)
    zero = gl.zeros([64, 64], gl.float32, layout=mma(64))
    tile = first * H + i_h
    _fetch_chunk(
        k64, k32, q64, q32, v, A, P, k_in, q_in, v_in, a_in, p_in, k_bar, q_bar, v_bar, a_bar, p_bar,
        start, key_col, value_col, tile * 64, 0, count > 0, K, WITH_OUTPUT,
    )  # fmt: skip
    G_next, G_end_next = _gates_of(G, tile, count > 0)
    out_low = zero.to(gl.bfloat16)  # the last chunk's outputs: they leave while the next chunk's first products run
    for c in range(count):
        stage, phase = c % 2, (c // 2) % 2
        tile = (first + c) * H + i_h
        G_t, G_end = G_next, G_end_next
        S_left, S_low = _low(S, K)
        _await(k_bar, stage, phase, K)
        predicted = _against_rows(S_left, k_in, stage, zero, K)
        _await(v_bar, stage, phase, 64)
        v_t = v_in[0].index(stage).permute((1, 0)).load(mma(64)).to(gl.float32)
        _fetch_chunk(
            k64, k32, q64, q32, v, A, P, k_in, q_in, v_in, a_in, p_in, k_bar, q_bar, v_bar, a_bar, p_bar,
            start + (c + 1) * 64, key_col, value_col, (tile + H) * 64, 1 - stage, c + 1 < count, K, WITH_OUTPUT,
        )  # fmt: skip
        G_next, G_end_next = _gates_of(G, tile + H, c + 1 < count)
        decay = exp2(G_t)
        if WITH_OUTPUT:  # noqa: SIM102  (known at compile time; the one below is not)
            if c > 0:
                tma.store_wait(0)
                gl.thread_barrier()
                _put_transposed(o, o_pointer, start + (c - 1) * 64, value_col, end, out_low, o_out[0].index(0), H * V)
        _await(a_bar, stage, phase, 64)
        predicted = warpgroup_mma_wait(0, deps=(predicted,))
        left, power = _half_rows(v_t - predicted * decay[None, :])
        new = warpgroup_mma(left, a_in[0].index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        if WITH_OUTPUT:
            _await(q_bar, stage, phase, K)
            out = _against_rows(S_left, q_in, stage, zero, K)
        if WITH_STATES:
            tma.store_wait(0)
            gl.thread_barrier()
            _put(states64, states32, tile * V + i_v * 64, s_out, S_low, K)
        S = _scaled(S, exp2(G_end), K)
        if WITH_OUTPUT:
            new = warpgroup_mma_wait(tile_count(K), deps=(new,))
        else:
            new = warpgroup_mma_wait(0, deps=(new,))
        new = new * power[:, None]
        new_low = new.to(gl.bfloat16)
        written = (new * exp2(G_end - G_t)[None, :]).to(gl.bfloat16)
        S = _add_rows(written, k_in, stage, S, K)
        if WITH_STATES:
            _put(new_values, new_values, tile * V + i_v * 64, n_out, (new_low,), 64)
        if WITH_OUTPUT:
            _await(p_bar, stage, phase, 64)
            left = gl.convert_layout(new_low, operand(64))
            out = warpgroup_mma_wait(tile_count(K), deps=(out,)) * (decay * scale)[None, :]
            out = warpgroup_mma(left, p_in[0].index(stage).permute((1, 0)), out, is_async=True)
            out_low = warpgroup_mma_wait(0, deps=(out,)).to(gl.bfloat16)
        S = _landed(S, K)
    if WITH_OUTPUT:  # noqa: SIM102
        if count > 0:
            tma.store_wait(0)
            gl.thread_barrier()
            row = start + (count - 1) * 64
            _put_transposed(o, o_pointer, row, value_col, end, out_low, o_out[0].index(0), H * V)
    tma.store_wait(0)
    if WITH_FINAL:
        _uncarry(final, i_nh.to(gl.int64) * (K * W) + i_v * 64, S, W, K)


@gluon.jit(do_not_specialize=["T", "NT", "segments"])
def reverse_scan_kernel(
    q64, q32, k64, k32, do, A, P, dv, dstates64, dstates32,
    G, dv_pointer, dfinal, dinitial, cu, chunk_start, scale, T, NT, segments,
    H: gl.constexpr, HK: gl.constexpr, K: gl.constexpr, V: gl.constexpr, VARLEN: gl.constexpr,
    WITH_FINAL: gl.constexpr, WITH_INITIAL: gl.constexpr, WITH_OUTPUT: gl.constexpr,
):  # fmt: skip
    i_v, i_nh = gl.program_id(0), gl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    start, end, first, count = _span(i_n, cu, chunk_start, T, NT, segments, VARLEN)
    key_col, value_col = i_h // (H // HK) * K, i_h * V + i_v * 64
    k_in, q_in, do_in = _buffers(2, K), _buffers(2, K), _buffers(2, 64)
    a_in, p_in, s_out = _buffers(2, 64, gl.float16), _buffers(2, 64), _buffers(1, K)
    k_bar, q_bar, do_bar, a_bar, p_bar = _barriers(K), _barriers(K), _barriers(64), _barriers(64), _barriers(64)
    fence_async_shared()
    t = gl.arange(0, 64, layout=gl.SliceLayout(0, mma(64)))

    dS = _carry(dfinal, i_nh.to(gl.int64) * (K * V) + i_v * 64, V, K, WITH_FINAL)
    zero = gl.zeros([64, 64], gl.float32, layout=mma(64))
    last = count - 1
    tile = (first + last) * H + i_h
    _fetch_chunk(
        k64, k32, q64, q32, do, A, P, k_in, q_in, do_in, a_in, p_in, k_bar, q_bar, do_bar, a_bar, p_bar,
        start + last * 64, key_col, value_col, tile * 64, 0, count > 0, K, True,
    )  # fmt: skip
    G_next, G_end_next = _gates_of(G, tile, count > 0)
    for step in range(count):
        stage, phase = step % 2, (step // 2) % 2
        c = last - step
        tile = (first + c) * H + i_h
        G_t, G_end = G_next, G_end_next
        dS_left, dS_low = _low(dS, K)
        _await(k_bar, stage, phase, K)
        dnew = _against_rows(dS_left, k_in, stage, zero, K)
        _await(do_bar, stage, phase, 64)
        _await(p_bar, stage, phase, 64)
        do_t = do_in[0].index(stage).permute((1, 0))
        inside = warpgroup_mma(do_t, p_in[0].index(stage), zero, use_acc=False, is_async=True)
        _fetch_chunk(
            k64, k32, q64, q32, do, A, P, k_in, q_in, do_in, a_in, p_in, k_bar, q_bar, do_bar, a_bar, p_bar,
            start + (c - 1) * 64, key_col, value_col, (tile - H) * 64, 1 - stage, c > 0, K, True,
        )  # fmt: skip
        G_next, G_end_next = _gates_of(G, tile - H, c > 0)
        decay = exp2(G_t)
        # a chunk may reach into the next document: there q and do are another's, and only their product sees both
        from_queries = gl.where(start + c * 64 + t < end, decay * scale, 0.0)
        from_queries = gl.convert_layout(from_queries, gl.SliceLayout(0, operand(64)))
        left_q = (do_t.load(operand(64)).to(gl.float32) * from_queries[None, :]).to(gl.bfloat16)
        if WITH_OUTPUT:
            tma.store_wait(0)
            gl.thread_barrier()
            _put(dstates64, dstates32, tile * V + i_v * 64, s_out, dS_low, K)
        inside, dnew = warpgroup_mma_wait(0, deps=(inside, dnew))
        dnew = dnew * exp2(G_end - G_t)[None, :] + inside
        left, power = _half_rows(dnew)
        _await(a_bar, stage, phase, 64)
        dS = _scaled(dS, exp2(G_end), K)
        dz = warpgroup_mma(left, a_in[0].index(stage), zero, use_acc=False, is_async=True)
        _await(q_bar, stage, phase, K)
        dS = _add_rows(left_q, q_in, stage, dS, K)
        dz = warpgroup_mma_wait(tile_count(K), deps=(dz,))
        dz = dz * power[:, None]
        dz_low = dz.to(gl.bfloat16)
        dS = _add_rows((dz * -decay[None, :]).to(gl.bfloat16), k_in, stage, dS, K)
        if WITH_OUTPUT:
            tma.store_wait(0)
            gl.thread_barrier()
            _put_transposed(dv, dv_pointer, start + c * 64, value_col, end, dz_low, s_out[0].index(0), H * V)
        dS = _landed(dS, K)
    tma.store_wait(0)
    if WITH_INITIAL:
        _uncarry(dinitial, i_nh.to(gl.int64) * (K * V) + i_v * 64, dS, V, K)
