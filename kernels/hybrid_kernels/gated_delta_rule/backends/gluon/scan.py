"""The two scans of backends/triton/scan.py in Gluon for Hopper, with explicit asynchronous copies and GEMMs.

Triton's compiler waits for every GEMM of the chain and issues its copies late. Here bulk copies fetch tiles two chunks ahead,
independent GEMMs overlap, and stores leave through shared memory while the next GEMMs run. One warpgroup keeps S^T [64 values, K]
and every left operand in registers (parts.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hybrid_kernels.gated_delta_rule.backends.gluon.parts import (
    add_rows,
    against_rows,
    carry,
    exp2,
    fetch_chunk,
    gates_of,
    half_rows,
    identity,
    landed,
    lowered,
    mma,
    new_barriers,
    new_buffers,
    operand,
    put,
    put_transposed,
    scaled,
    span_of,
    uncarry,
    wait_for,
)
from hybrid_kernels.triton_support import tile_count


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
    start, end, first, count = span_of(i_n, cu, chunk_start, T, NT, segments, VARLEN)
    key_col, value_col = i_h // (H // HK) * K, i_h * V + i_v * 64
    if WITH_TRANSITION:
        value_col = gl.where(i_v < V // 64, value_col, H * V)  # beyond the last column: the copies bring zeros
    W: gl.constexpr = V + 64 * tile_count(K) * WITH_TRANSITION
    k_in, v_in, a_in = new_buffers(2, K), new_buffers(2, 64), new_buffers(2, 64, gl.float16)
    k_bar, v_bar, a_bar = new_barriers(K), new_barriers(64), new_barriers(64)
    q_in, q_bar, p_in, p_bar = k_in, k_bar, v_in, v_bar
    if WITH_OUTPUT:
        q_in, q_bar, p_in, p_bar = new_buffers(2, K), new_barriers(K), new_buffers(2, 64), new_barriers(64)
        o_out = new_buffers(1, 64)
    if WITH_STATES:
        s_out, n_out = new_buffers(1, K), new_buffers(1, 64)
    fence_async_shared()

    if WITH_TRANSITION:
        S = identity(i_v * 64 - V, K)
    else:
        S = carry(initial, i_nh.to(gl.int64) * (K * V) + i_v * 64, V, K, WITH_INITIAL)
    zero = gl.zeros([64, 64], gl.float32, layout=mma(64))
    tile = first * H + i_h
    fetch_chunk(
        k64, k32, q64, q32, v, A, P, k_in, q_in, v_in, a_in, p_in, k_bar, q_bar, v_bar, a_bar, p_bar,
        start, key_col, value_col, tile * 64, 0, count > 0, K, WITH_OUTPUT,
    )  # fmt: skip
    G_next, G_end_next = gates_of(G, tile, count > 0)
    out_low = zero.to(gl.bfloat16)  # the last chunk's outputs: they leave while the next chunk's first products run
    for c in range(count):
        stage, phase = c % 2, (c // 2) % 2
        tile = (first + c) * H + i_h
        G_t, G_end = G_next, G_end_next
        S_left, S_low = lowered(S, K)
        wait_for(k_bar, stage, phase, K)
        predicted = against_rows(S_left, k_in, stage, zero, K)
        wait_for(v_bar, stage, phase, 64)
        v_t = v_in[0].index(stage).permute((1, 0)).load(mma(64)).to(gl.float32)
        fetch_chunk(
            k64, k32, q64, q32, v, A, P, k_in, q_in, v_in, a_in, p_in, k_bar, q_bar, v_bar, a_bar, p_bar,
            start + (c + 1) * 64, key_col, value_col, (tile + H) * 64, 1 - stage, c + 1 < count, K, WITH_OUTPUT,
        )  # fmt: skip
        G_next, G_end_next = gates_of(G, tile + H, c + 1 < count)
        decay = exp2(G_t)
        if WITH_OUTPUT:  # noqa: SIM102  (known at compile time; the one below is not)
            if c > 0:
                tma.store_wait(0)
                gl.thread_barrier()
                put_transposed(o, o_pointer, start + (c - 1) * 64, value_col, end, out_low, o_out[0].index(0), H * V)
        wait_for(a_bar, stage, phase, 64)
        predicted = warpgroup_mma_wait(0, deps=(predicted,))
        left, power = half_rows(v_t - predicted * decay[None, :])
        new = warpgroup_mma(left, a_in[0].index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        if WITH_OUTPUT:
            wait_for(q_bar, stage, phase, K)
            out = against_rows(S_left, q_in, stage, zero, K)
        if WITH_STATES:
            tma.store_wait(0)
            gl.thread_barrier()
            put(states64, states32, tile * V + i_v * 64, s_out, S_low, K)
        S = scaled(S, exp2(G_end), K)
        if WITH_OUTPUT:
            new = warpgroup_mma_wait(tile_count(K), deps=(new,))
        else:
            new = warpgroup_mma_wait(0, deps=(new,))
        new = new * power[:, None]
        new_low = new.to(gl.bfloat16)
        written = (new * exp2(G_end - G_t)[None, :]).to(gl.bfloat16)
        S = add_rows(written, k_in, stage, S, K)
        if WITH_STATES:
            put(new_values, new_values, tile * V + i_v * 64, n_out, (new_low,), 64)
        if WITH_OUTPUT:
            wait_for(p_bar, stage, phase, 64)
            left = gl.convert_layout(new_low, operand(64))
            out = warpgroup_mma_wait(tile_count(K), deps=(out,)) * (decay * scale)[None, :]
            out = warpgroup_mma(left, p_in[0].index(stage).permute((1, 0)), out, is_async=True)
            out_low = warpgroup_mma_wait(0, deps=(out,)).to(gl.bfloat16)
        S = landed(S, K)
    if WITH_OUTPUT:  # noqa: SIM102
        if count > 0:
            tma.store_wait(0)
            gl.thread_barrier()
            row = start + (count - 1) * 64
            put_transposed(o, o_pointer, row, value_col, end, out_low, o_out[0].index(0), H * V)
    tma.store_wait(0)
    if WITH_FINAL:
        uncarry(final, i_nh.to(gl.int64) * (K * W) + i_v * 64, S, W, K)


@gluon.jit(do_not_specialize=["T", "NT", "segments"])
def reverse_scan_kernel(
    q64, q32, k64, k32, do, A, P, dv, dstates64, dstates32,
    G, dv_pointer, dfinal, dinitial, cu, chunk_start, scale, T, NT, segments,
    H: gl.constexpr, HK: gl.constexpr, K: gl.constexpr, V: gl.constexpr, VARLEN: gl.constexpr,
    WITH_FINAL: gl.constexpr, WITH_INITIAL: gl.constexpr, WITH_OUTPUT: gl.constexpr,
):  # fmt: skip
    i_v, i_nh = gl.program_id(0), gl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    start, end, first, count = span_of(i_n, cu, chunk_start, T, NT, segments, VARLEN)
    key_col, value_col = i_h // (H // HK) * K, i_h * V + i_v * 64
    k_in, q_in, do_in = new_buffers(2, K), new_buffers(2, K), new_buffers(2, 64)
    a_in, p_in, s_out = new_buffers(2, 64, gl.float16), new_buffers(2, 64), new_buffers(1, K)
    k_bar, q_bar, do_bar, a_bar, p_bar = (
        new_barriers(K),
        new_barriers(K),
        new_barriers(64),
        new_barriers(64),
        new_barriers(64),
    )
    fence_async_shared()
    t = gl.arange(0, 64, layout=gl.SliceLayout(0, mma(64)))

    dS = carry(dfinal, i_nh.to(gl.int64) * (K * V) + i_v * 64, V, K, WITH_FINAL)
    zero = gl.zeros([64, 64], gl.float32, layout=mma(64))
    last = count - 1
    tile = (first + last) * H + i_h
    fetch_chunk(
        k64, k32, q64, q32, do, A, P, k_in, q_in, do_in, a_in, p_in, k_bar, q_bar, do_bar, a_bar, p_bar,
        start + last * 64, key_col, value_col, tile * 64, 0, count > 0, K, True,
    )  # fmt: skip
    G_next, G_end_next = gates_of(G, tile, count > 0)
    for step in range(count):
        stage, phase = step % 2, (step // 2) % 2
        c = last - step
        tile = (first + c) * H + i_h
        G_t, G_end = G_next, G_end_next
        dS_left, dS_low = lowered(dS, K)
        wait_for(k_bar, stage, phase, K)
        dnew = against_rows(dS_left, k_in, stage, zero, K)
        wait_for(do_bar, stage, phase, 64)
        wait_for(p_bar, stage, phase, 64)
        do_t = do_in[0].index(stage).permute((1, 0))
        inside = warpgroup_mma(do_t, p_in[0].index(stage), zero, use_acc=False, is_async=True)
        fetch_chunk(
            k64, k32, q64, q32, do, A, P, k_in, q_in, do_in, a_in, p_in, k_bar, q_bar, do_bar, a_bar, p_bar,
            start + (c - 1) * 64, key_col, value_col, (tile - H) * 64, 1 - stage, c > 0, K, True,
        )  # fmt: skip
        G_next, G_end_next = gates_of(G, tile - H, c > 0)
        decay = exp2(G_t)
        # a chunk may reach into the next document: there q and do are another's, and only their product sees both
        from_queries = gl.where(start + c * 64 + t < end, decay * scale, 0.0)
        from_queries = gl.convert_layout(from_queries, gl.SliceLayout(0, operand(64)))
        left_q = (do_t.load(operand(64)).to(gl.float32) * from_queries[None, :]).to(gl.bfloat16)
        if WITH_OUTPUT:
            tma.store_wait(0)
            gl.thread_barrier()
            put(dstates64, dstates32, tile * V + i_v * 64, s_out, dS_low, K)
        inside, dnew = warpgroup_mma_wait(0, deps=(inside, dnew))
        dnew = dnew * exp2(G_end - G_t)[None, :] + inside
        left, power = half_rows(dnew)
        wait_for(a_bar, stage, phase, 64)
        dS = scaled(dS, exp2(G_end), K)
        dz = warpgroup_mma(left, a_in[0].index(stage), zero, use_acc=False, is_async=True)
        wait_for(q_bar, stage, phase, K)
        dS = add_rows(left_q, q_in, stage, dS, K)
        dz = warpgroup_mma_wait(tile_count(K), deps=(dz,))
        dz = dz * power[:, None]
        dz_low = dz.to(gl.bfloat16)
        dS = add_rows((dz * -decay[None, :]).to(gl.bfloat16), k_in, stage, dS, K)
        if WITH_OUTPUT:
            tma.store_wait(0)
            gl.thread_barrier()
            put_transposed(dv, dv_pointer, start + c * 64, value_col, end, dz_low, s_out[0].index(0), H * V)
        dS = landed(dS, K)
    tma.store_wait(0)
    if WITH_INITIAL:
        uncarry(dinitial, i_nh.to(gl.int64) * (K * V) + i_v * 64, dS, V, K)
