"""Last kernel of the backward pass: dq, dk, dg and dbeta of all chunks in parallel, from the results of the two scans.

With R = dz new^T (dz the gradient of v - exp(G) k S, which is dv; new = A (v - exp(G) k S)), the gradient of
k_i.k_j inside the inverse is -R[i, j] exp(G_i - G_j) for j < i, for any inverse, and that of beta_i is
R[i, i] / beta_i^2. The gradient of G needs no [64, 64] sums: it is q.dq plus the signed products of k and the parts of dk.
"""

import triton
import triton.language as tl

from hybrid_kernels.gated_delta_rule.backends.triton.prepare import (
    at_least,
    chunk_span,
    load_decays,
    position_of,
    sum_in_document,
)
from hybrid_kernels.triton_support import exp2, store_rows_in_place, tile_count, tile_width


@triton.jit
def _tile(base, rows, mask, stride, WIDTH: tl.constexpr):
    return tl.load(base + rows[:, None] * stride + tl.arange(0, WIDTH)[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def _part(
    q, k, beta, do, dv, G, states, new_values, dstates, dq, dk, dg, dbeta, positions, start, end, tile, i_h, scale, offset,
    WITH_BETA, one, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Write columns offset ... offset + WIDTH of dq and dk, their part of dg, and dbeta if requested."""
    dtype = k.dtype.element_ty
    t = tl.arange(0, 64)
    valid, every = start + t < end, t < 64
    from_start, to_last, whole = load_decays(G, tile, DOCUMENTS)
    dP, R = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
    from_q, from_new = tl.zeros([64, WIDTH], tl.float32), tl.zeros([64, WIDTH], tl.float32)
    from_z = tl.zeros([64, WIDTH], tl.float32)
    kept = tl.zeros([64], tl.float32)  # per value row: <dS', S>
    # not range(1): the compiler would unroll it, and it miscompiles these GEMMs on Hopper outside a pipelined loop (see
    # gradients_options)
    tiles = V // 64 if V > 64 else one
    for i_v in range(tiles):
        at = (start * H + i_h) * V + i_v * 64
        do_t, dz_t = _tile(do + at, t, valid, H * V, 64), _tile(dv + at, t, valid, H * V, 64)
        new = _tile(new_values + (tile * V + i_v * 64) * 64, t, every, 64, 64)  # [v, t]
        state = (tile * V + i_v * 64) * K + offset
        S, dS = _tile(states + state, t, every, K, WIDTH), _tile(dstates + state, t, every, K, WIDTH)
        dP = tl.dot(do_t, new, dP, input_precision="ieee")
        R = tl.dot(dz_t, new, R, input_precision="ieee")
        from_q = tl.dot(do_t, S, from_q, input_precision="ieee")
        from_z = tl.dot(dz_t, S, from_z, input_precision="ieee")
        from_new = tl.dot(tl.trans(new), dS, from_new, input_precision="ieee")
        kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)

    on_diagonal = t[:, None] == t[None, :]
    if WITH_BETA:
        b_t = at_least(tl.load(beta + (start + t) * H + i_h, mask=valid, other=1.0).to(tl.float32), dtype)
        if dtype != tl.float32:
            b_t = b_t.to(tl.float16).to(tl.float32)  # as on A's diagonal, so that the rounding cancels
        db_t = tl.sum(tl.where(on_diagonal, R, 0.0), 1) / b_t / b_t
        tl.store(dbeta + (start + t) * H + i_h, db_t.to(dbeta.dtype.element_ty), mask=valid)
    G_t, seen = from_start, t[:, None] >= t[None, :]
    if DOCUMENTS:
        G_t, position = tl.load(G + tile * 192 + t), position_of(positions, start + t, end)
        seen = seen & (t[None, :] >= (t - position)[:, None])
    between = exp2(tl.where(seen, G_t[:, None] - G_t[None, :], float("-inf")))
    dP = (dP * between * scale).to(dtype)
    R = tl.where(on_diagonal, 0.0, -R * between).to(dtype)

    key = (start * HK + i_h // (H // HK)) * K + offset
    q_t, k_t = _tile(q + key, t, valid, HK * K, WIDTH), _tile(k + key, t, valid, HK * K, WIDTH)
    dq_t = tl.dot(dP, k_t, from_q * (exp2(from_start) * scale)[:, None], input_precision="ieee")
    early = from_z * -exp2(from_start)[:, None]  # terms of dk with a decay that grows with G_i
    early = tl.dot(R, k_t, early, input_precision="ieee")
    to_end = from_new * exp2(to_last)[:, None]
    late = tl.dot(tl.trans(dP), q_t, to_end, input_precision="ieee")  # terms with a decay that shrinks
    late = tl.dot(tl.trans(R), k_t, late, input_precision="ieee")
    q_f, k_f = q_t.to(tl.float32), k_t.to(tl.float32)
    dG = tl.sum(q_f * dq_t + k_f * (early - late), 1)
    last = tl.sum(tl.sum(k_f * to_end, 1), 0) + tl.sum(kept, 0) * exp2(whole)
    if DOCUMENTS:
        is_last = position_of(positions, start + t + 1, end) == 0
        dg_t = sum_in_document(dG, is_last, True) + tl.where(to_last > float("-inf"), last, 0.0)
        dg_t = tl.where(position > 0, dg_t, 0.0)  # a document's first token decays no state
    else:
        dg_t = tl.cumsum(dG, 0, reverse=True) + last
    tl.store(dg + (start + t) * H + i_h, dg_t, mask=valid)
    at = (start * H + i_h) * K + offset
    store_rows_in_place(dq + at, t * (H * K), dq_t.to(dq.dtype.element_ty), valid)
    store_rows_in_place(dk + at, t * (H * K), (early + late).to(dk.dtype.element_ty), valid)


@triton.jit(do_not_specialize=["T", "NT", "one"])
def gradients_kernel(
    q, k, beta, do, dv, G, states, new_values, dstates, dq, dk, dg, dbeta,
    positions, cu, chunk_start, chunk_sequence, scale, T, NT, part_stride, one,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Run one program per chunk, head and tile of K, so that two fit an SM and one's loads overlap the other's epilogue."""
    part, i_h, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = chunk_span(i_c, cu, chunk_start, chunk_sequence, T, NT, VARLEN)
    if start < end:
        tile = i_c.to(tl.int64) * H + i_h
        dg += part.to(tl.int64) * part_stride
        if part < tile_count(K) - 1:
            _part(
                q, k, beta, do, dv, G, states, new_values, dstates, dq, dk, dg, dbeta, positions, start, end, tile, i_h,
                scale, part * 64, part == 0, one, H, HK, K, V, tile_width(K, 0), DOCUMENTS,
            )  # fmt: skip
        else:
            _part(
                q, k, beta, do, dv, G, states, new_values, dstates, dq, dk, dg, dbeta, positions, start, end, tile, i_h,
                scale, part * 64, part == 0, one, H, HK, K, V, tile_width(K, tile_count(K) - 1), DOCUMENTS,
            )  # fmt: skip
