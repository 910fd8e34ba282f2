"""The two scans of the chunked gated delta rule. One program carries S^T [64 values, K] in registers.

Values come first because Hopper's GEMM instructions have 64 rows. So the state, the new values and the outputs are left operands
or results in registers, and only q, k, A and P (see prepare.py) pass through shared memory.
"""

import triton
import triton.language as tl

from hybrid_kernels.gated_delta_rule.backends.triton.prepare import load_decays
from hybrid_kernels.triton_support import (
    cast_tiles,
    exp2,
    half_rows,
    load_tiles,
    store_tiles,
    tile_count,
    tile_width,
    zero_tiles,
)


@triton.jit
def sequence_span(i_n, cu, chunk_start, T, NT, segments, VARLEN: tl.constexpr):
    """Return first token, end of the tokens, first chunk and number of chunks of packed sequence (or segment of a row) i_n."""
    if VARLEN:
        start, end = tl.load(cu + i_n).to(tl.int64), tl.load(cu + i_n + 1).to(tl.int64)
        first = tl.load(chunk_start + i_n)
        count = tl.load(chunk_start + i_n + 1) - first
    else:
        row, per = i_n // segments, (NT + segments - 1) // segments
        before = i_n % segments * per
        start = row.to(tl.int64) * T + before * 64
        end = (row.to(tl.int64) + 1) * T
        first = row * NT + before
        count = tl.minimum(per, NT - before)
    return start, end, first, count


@triton.jit
def _values(v, token, end, i_h, cols, H: tl.constexpr, V: tl.constexpr):
    """Load columns `cols` of a chunk's values, zero past the end of the tokens and of the columns."""
    t = token + tl.arange(0, 64)
    at = v + (t[:, None] * H + i_h) * V + cols[None, :]
    return tl.load(at, mask=(t < end)[:, None] & (cols < V)[None, :], other=0.0)


@triton.jit(do_not_specialize=["T", "NT", "segments"])
def forward_scan_kernel(
    q, k, v, A, P, G, o, states, new_values, initial, final, cu, chunk_start, scale, T, NT, segments,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr,
    WITH_INITIAL: tl.constexpr, WITH_FINAL: tl.constexpr, WITH_OUTPUT: tl.constexpr,
    WITH_STATES: tl.constexpr, WITH_TRANSITION: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Scan from the first chunk to the last.

    WITH_TRANSITION: more programs carry the identity without values. They end with the transition [K, K], which maps an initial
    state to its part of the final one, and write it to columns V ... V + K of `final`.
    """
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    start, end, first, count = sequence_span(i_n, cu, chunk_start, T, NT, segments, VARLEN)
    dtype = k.dtype.element_ty
    t, rows_v = tl.arange(0, 64), tl.arange(0, 64)
    every = rows_v < 64
    cols_v = i_v * 64 + rows_v
    W: tl.constexpr = V + 64 * tile_count(K) * WITH_TRANSITION
    state_at = (i_nh.to(tl.int64) * K) * W + i_v * 64
    S = zero_tiles(64, K)
    if WITH_TRANSITION:
        S = ()
        for i in tl.static_range(tile_count(K)):
            cols = V + 64 * i + tl.arange(0, tile_width(K, i))
            S = S + (tl.where(cols_v[:, None] == cols[None, :], 1.0, 0.0),)
    if WITH_INITIAL:  # stored [K, V]: rows of S^T are its columns
        S = ()
        for i in tl.static_range(tile_count(K)):
            cols = 64 * i + tl.arange(0, tile_width(K, i))
            S = S + (tl.load(initial + state_at + cols[None, :] * V + rows_v[:, None]).to(tl.float32),)
    # Transpose v by a GEMM, which is exact: a change of layout would go through shared memory in four parts with two barriers
    # each, and the compiler prefetches only the operands of GEMMs.
    one = tl.where(rows_v[:, None] == t[None, :], 1.0, 0.0).to(dtype)
    for c in range(count):
        token = start + c * 64
        valid = token + t < end
        tile = (first + c).to(tl.int64) * H + i_h
        square = tile * 4096 + t[:, None] * 64 + t[None, :]
        key = (token * HK + i_h // (H // HK)) * K
        k_tiles = load_tiles(k + key, t, valid, HK * K, K)
        value = (token * H + i_h) * V
        v_t = _values(v, token, end, i_h, cols_v, H, V)
        a = tl.load(A + square)
        from_start, to_end, whole = load_decays(G, tile, DOCUMENTS)

        S_low = cast_tiles(S, dtype, K)
        predicted = tl.zeros([64, 64], tl.float32)  # [v, t]: the state's value for each key
        for i in tl.static_range(tile_count(K)):
            predicted = tl.dot(S_low[i], tl.trans(k_tiles[i]), predicted, input_precision="ieee")
        given = tl.dot(one, tl.trans(v_t), input_precision="ieee")
        rest, power = half_rows(given - predicted * exp2(from_start)[None, :], dtype)
        new = tl.dot(rest, tl.trans(a), input_precision="ieee") * power[:, None]

        if WITH_STATES:
            store_tiles(states + (tile * V + i_v * 64) * K, rows_v, every, K, S_low, K)
            at = new_values + tile * V * 64 + cols_v[:, None] * 64 + t[None, :]
            tl.store(at, new.to(dtype))
        if WITH_OUTPUT:
            p = tl.load(P + square)
            q_tiles = load_tiles(q + key, t, valid, HK * K, K)
            out = tl.zeros([64, 64], tl.float32)
            for i in tl.static_range(tile_count(K)):
                out = tl.dot(S_low[i], tl.trans(q_tiles[i]), out, input_precision="ieee")
            out = out * (exp2(from_start) * scale)[None, :]
            out = tl.dot(new.to(dtype), tl.trans(p), out, input_precision="ieee")
            at = o + value + t[None, :] * (H * V) + cols_v[:, None]
            tl.store(at, out.to(o.dtype.element_ty), mask=valid[None, :])

        written = (new * exp2(to_end)[None, :]).to(dtype)
        S_next = ()
        for i in tl.static_range(tile_count(K)):
            S_next = S_next + (tl.dot(written, k_tiles[i], S[i] * exp2(whole), input_precision="ieee"),)
        S = S_next
    if WITH_FINAL:
        for i in tl.static_range(tile_count(K)):
            cols = 64 * i + tl.arange(0, tile_width(K, i))
            tl.store(final + state_at + cols[None, :] * W + rows_v[:, None], S[i])


@triton.jit(do_not_specialize=["T", "NT", "segments"])
def reverse_scan_kernel(
    q, k, do, A, P, G, dv, dstates, dfinal, dinitial, cu, chunk_start, scale, T, NT, segments,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr,
    WITH_FINAL: tl.constexpr, WITH_INITIAL: tl.constexpr, WITH_OUTPUT: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Carry the gradient of S^T from the last chunk to the first. dv is also the gradient of v - exp(G) k S."""
    i_v, i_nh = tl.program_id(0), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    start, end, first, count = sequence_span(i_n, cu, chunk_start, T, NT, segments, VARLEN)
    dtype = k.dtype.element_ty
    t, rows_v = tl.arange(0, 64), tl.arange(0, 64)
    every = rows_v < 64
    cols_v = i_v * 64 + rows_v
    state_at = (i_nh.to(tl.int64) * K) * V + i_v * 64
    dS = zero_tiles(64, K)
    if WITH_FINAL:
        dS = ()
        for i in tl.static_range(tile_count(K)):
            cols = 64 * i + tl.arange(0, tile_width(K, i))
            dS = dS + (tl.load(dfinal + state_at + cols[None, :] * V + rows_v[:, None]).to(tl.float32),)
    for step in range(count):
        c = count - 1 - step
        token = start + c * 64
        valid = token + t < end
        tile = (first + c).to(tl.int64) * H + i_h
        square = tile * 4096 + t[:, None] * 64 + t[None, :]
        key = (token * HK + i_h // (H // HK)) * K
        k_tiles = load_tiles(k + key, t, valid, HK * K, K)
        q_tiles = load_tiles(q + key, t, valid, HK * K, K)
        value = (token * H + i_h) * V
        do_t = tl.load(do + value + t[:, None] * (H * V) + cols_v[None, :], mask=valid[:, None], other=0.0)
        do_t = tl.trans(do_t)
        a, p = tl.load(A + square), tl.load(P + square)
        from_start, to_end, whole = load_decays(G, tile, DOCUMENTS)

        dS_low = cast_tiles(dS, dtype, K)
        if WITH_OUTPUT:
            store_tiles(dstates + (tile * V + i_v * 64) * K, rows_v, every, K, dS_low, K)
        dnew = tl.zeros([64, 64], tl.float32)  # [v, t]
        for i in tl.static_range(tile_count(K)):
            dnew = tl.dot(dS_low[i], tl.trans(k_tiles[i]), dnew, input_precision="ieee")
        dnew = dnew * exp2(to_end)[None, :]
        dnew = tl.dot(do_t, p, dnew, input_precision="ieee")
        dnew, power = half_rows(dnew, dtype)
        dz = tl.dot(dnew, a, input_precision="ieee") * power[:, None]
        if WITH_OUTPUT:
            at = dv + value + t[None, :] * (H * V) + cols_v[:, None]
            tl.store(at, dz.to(dv.dtype.element_ty), mask=valid[None, :])

        decay = exp2(from_start)[None, :]
        from_keys = (dz * -decay).to(dtype)
        from_queries = (do_t * (decay * scale)).to(dtype)
        dS_next = ()
        for i in tl.static_range(tile_count(K)):
            d = tl.dot(from_queries, q_tiles[i], dS[i] * exp2(whole), input_precision="ieee")
            dS_next = dS_next + (tl.dot(from_keys, k_tiles[i], d, input_precision="ieee"),)
        dS = dS_next
    if WITH_INITIAL:
        for i in tl.static_range(tile_count(K)):
            cols = 64 * i + tl.arange(0, tile_width(K, i))
            tl.store(dinitial + state_at + cols[None, :] * V + rows_v[:, None], dS[i])
