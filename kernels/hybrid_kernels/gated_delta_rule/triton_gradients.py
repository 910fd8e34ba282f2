"""Last kernel of the backward: dq, dk, dg and dbeta of every chunk at once, from what the two scans left.

With R = dz new^T (dz the gradient of v - exp(G) k S, which is dv; new = A (v - exp(G) k S)), the gradient of
k_i.k_j inside the inverse is -R[i, j] exp(G_i - G_j) for j < i, whatever the inverse is, and that of beta_i is
R[i, i] / beta_i^2. The gradient of G needs no [64, 64] sums: it is q.dq plus k times the parts of dk, signed.
"""

import triton
import triton.language as tl

from ..triton_support import exp2, load_tiles, store_tiles, tile_count, zero_tiles
from .triton_prepare import BETA_MIN, chunk_span


@triton.jit
def gradients_kernel(
    q, k, beta, do, dv, G, states, new_values, dstates, dq, dk, dg, dbeta,
    cu, chunk_start, chunk_document, scale, T, NT,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    i_c, i_h = tl.program_id(1), tl.program_id(0)
    start, end, _ = chunk_span(i_c, cu, chunk_start, chunk_document, T, NT, VARLEN)
    if start < end:
        dtype = k.dtype.element_ty
        t, rows_v = tl.arange(0, 64), tl.arange(0, 64)
        valid, every = start + t < end, rows_v < 64
        tile = i_c.to(tl.int64) * H + i_h
        G_t, G_end = tl.load(G + tile * 64 + t), tl.load(G + tile * 64 + 63)

        dP, R = tl.zeros([64, 64], tl.float32), tl.zeros([64, 64], tl.float32)
        from_q, from_new, from_z = zero_tiles(64, K), zero_tiles(64, K), zero_tiles(64, K)
        kept = tl.zeros([64], tl.float32)  # per value row: <dS', S>
        for i_v in range(V // 64):
            at = (start * H + i_h) * V + i_v * 64 + t[:, None] * (H * V) + rows_v[None, :]
            do_t = tl.load(do + at, mask=valid[:, None], other=0.0)
            dz_t = tl.load(dv + at, mask=valid[:, None], other=0.0)
            new = tl.load(new_values + (tile * V + i_v * 64) * 64 + rows_v[:, None] * 64 + t[None, :])  # [v, t]
            state = (tile * V + i_v * 64) * K
            S = load_tiles(states + state, rows_v, every, K, K)
            dS = load_tiles(dstates + state, rows_v, every, K, K)
            dP = tl.dot(do_t, new, dP, input_precision="ieee")
            R = tl.dot(dz_t, new, R, input_precision="ieee")
            next_q, next_new, next_z = (), (), ()
            for i in tl.static_range(tile_count(K)):
                next_q = next_q + (tl.dot(do_t, S[i], from_q[i], input_precision="ieee"),)
                next_z = next_z + (tl.dot(dz_t, S[i], from_z[i], input_precision="ieee"),)
                next_new = next_new + (tl.dot(tl.trans(new), dS[i], from_new[i], input_precision="ieee"),)
                kept += tl.sum(S[i].to(tl.float32) * dS[i].to(tl.float32), 1)
            from_q, from_new, from_z = next_q, next_new, next_z

        b_t = tl.maximum(tl.load(beta + (start + t) * H + i_h, mask=valid, other=1.0).to(tl.float32), BETA_MIN)
        on_diagonal = t[:, None] == t[None, :]
        db_t = tl.sum(tl.where(on_diagonal, R, 0.0), 1) / b_t / b_t
        tl.store(dbeta + (start + t) * H + i_h, db_t.to(dbeta.dtype.element_ty), mask=valid)
        between = exp2(tl.where(t[:, None] >= t[None, :], G_t[:, None] - G_t[None, :], float("-inf")))
        dP = (dP * between * scale).to(dtype)
        R = tl.where(on_diagonal, 0.0, -R * between).to(dtype)

        key = (start * HK + i_h // (H // HK)) * K
        q_tiles, k_tiles = load_tiles(q + key, t, valid, HK * K, K), load_tiles(k + key, t, valid, HK * K, K)
        dG, to_end = tl.zeros([64], tl.float32), tl.zeros([64], tl.float32)
        dq_tiles, dk_tiles = (), ()
        for i in tl.static_range(tile_count(K)):
            q_f, k_f = q_tiles[i].to(tl.float32), k_tiles[i].to(tl.float32)
            dq_i = from_q[i] * (exp2(G_t) * scale)[:, None]
            dq_i = tl.dot(dP, k_tiles[i], dq_i, input_precision="ieee")
            early = from_z[i] * -exp2(G_t)[:, None]  # terms of dk whose decay grows with G_i
            early = tl.dot(R, k_tiles[i], early, input_precision="ieee")
            end_i = from_new[i] * exp2(G_end - G_t)[:, None]
            late = tl.dot(tl.trans(dP), q_tiles[i], end_i, input_precision="ieee")  # and those whose decay shrinks
            late = tl.dot(tl.trans(R), k_tiles[i], late, input_precision="ieee")
            dG += tl.sum(q_f * dq_i + k_f * (early - late), 1)
            to_end += tl.sum(k_f * end_i, 1)
            dq_tiles = dq_tiles + (dq_i,)
            dk_tiles = dk_tiles + (early + late,)
        out = (start * H + i_h) * K
        store_tiles(dq + out, t, valid, H * K, dq_tiles, K)
        store_tiles(dk + out, t, valid, H * K, dk_tiles, K)
        last = tl.sum(to_end, 0) + tl.sum(kept, 0) * exp2(G_end)
        dg_t = tl.cumsum(dG, 0, reverse=True) + last
        tl.store(dg + (start + t) * H + i_h, dg_t.to(dg.dtype.element_ty), mask=valid)
