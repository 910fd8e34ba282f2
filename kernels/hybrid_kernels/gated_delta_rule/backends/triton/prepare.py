"""First kernel of the chunked gated delta rule: everything inside a chunk that does not depend on the state.

Per chunk of 64 tokens and value head, with G the running sum of g inside the chunk:
    P[i, j] = scale * q_i.k_j * exp(G_i - G_j)              for j <= i
    N[i, j] = beta_i * k_i.k_j * exp(G_i - G_j)             for j <  i
    A       = (I + N)^-1 diag(beta)
The chunk's new values are A (v - exp(G) k S), and its outputs scale exp(G) q S + P new. A is stored
in fp16: for similar keys and beta near 2 its entries cancel in the state, and the rounding errors of bf16 would grow from chunk to
chunk.

The inverse is block substitution in fp32 (tf32 x 3 GEMMs). The diagonal 2-blocks of I + N invert exactly. If X inverts the diagonal
blocks of one size and E holds the blocks below them, X - X E X inverts the blocks of twice that size. Up to size 16 this runs on
all four 16-blocks at once, each in one warp.

Documents need not begin where chunks do. Token i sees token j before it if i - j is at most i's position in its document, and the
state before the chunk if its position is greater than its place in the chunk. Tokens past the end of a row continue its last
document. All other factors are zero, and G is summed inside documents, so that no result depends on another document. Then G has
three rows per chunk and head: logarithms of the decay since the document's first token in the chunk, since the state before the
chunk, and until the state after it.
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_support import dot_fp32, exp2, load_tiles, tile_count, tile_width

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def at_least(b, dtype: tl.constexpr):
    """Clamp beta, so that A's diagonal holds no zero: the backward pass divides by it twice."""
    return tl.maximum(b, 1e-10 if dtype == tl.float32 else 2.0**-20)


@triton.jit
def chunk_span(i_c, cu, chunk_start, chunk_sequence, T, NT, VARLEN: tl.constexpr):
    """Return the first token (flat over batch and sequence) of chunk i_c, and the end of its packed sequence or batch row."""
    if VARLEN:
        sequence = tl.load(chunk_sequence + i_c)
        first = tl.load(cu + sequence).to(tl.int64)
        end = tl.load(cu + sequence + 1).to(tl.int64)
        start = first + (i_c - tl.load(chunk_start + sequence)) * 64
    else:
        row = (i_c // NT).to(tl.int64)
        start = row * T + (i_c % NT) * 64
        end = (row + 1) * T
    return start, end


@triton.jit
def position_of(positions, token, end):
    """Return the positions of tokens, of which those from `end` on continue the document of the token before."""
    place = tl.minimum(token, end - 1)
    return tl.load(positions + place) + (token - place).to(tl.int32)


@triton.jit
def _add_unless_first(first_a, a, first_b, b):
    return first_a | first_b, tl.where(first_b != 0, b, a + b)


@triton.jit
def sum_in_document(x, first, REVERSE: tl.constexpr):
    """Return the running sum of x [64], which starts again at each `first`. No sum depends on another document."""
    return tl.associative_scan((first.to(tl.int32), x), 0, _add_unless_first, reverse=REVERSE)[1]


@triton.jit
def store_decays(G, tile, G_t, position, last):
    """Store the three rows of a chunk. `last`: position of its last token."""
    t = tl.arange(0, 64)
    G += tile * 192
    G_end = tl.sum(tl.where(t == 63, G_t, 0.0), 0)
    tl.store(G + t, G_t)
    tl.store(G + 64 + t, tl.where(position > t, G_t, float("-inf")))
    tl.store(G + 128 + t, tl.where(63 - t <= last, G_end - G_t, float("-inf")))


@triton.jit
def load_decays(G, tile, DOCUMENTS: tl.constexpr):
    """Return logarithms of decays: from before a chunk to each token [64], from each token to its last [64], over all of it."""
    t = tl.arange(0, 64)
    if DOCUMENTS:
        G += tile * 192 + 64
        from_start, to_end, whole = tl.load(G + t), tl.load(G + 64 + t), tl.load(G + 63)
    else:
        G += tile * 64
        from_start, whole = tl.load(G + t), tl.load(G + 63)
        to_end = whole - from_start
    return from_start, to_end, whole


@triton.jit
def _key_products(k, start, end, left, right, stride, K: tl.constexpr):
    """Return k[left] k[right]^T in fp32, [n, r, c], for index blocks left [n, r] and right [n, c] relative to `start`."""
    out = tl.zeros([left.shape[0], left.shape[1], right.shape[1]], tl.float32)
    for i in tl.static_range(tile_count(K)):
        cols = 64 * i + tl.arange(0, tile_width(K, i))
        valid_l, valid_r = (start + left < end)[:, :, None], (start + right < end)[:, :, None]
        a = tl.load(k + left[:, :, None] * stride + cols[None, None, :], mask=valid_l, other=0.0)
        b = tl.load(k + right[:, :, None] * stride + cols[None, None, :], mask=valid_r, other=0.0)
        out = tl.dot(a, tl.permute(b, (0, 2, 1)), out, input_precision="ieee")
    return out


@triton.jit
def _merge(X, E):
    """Return X - X E X in fp32 (tf32 x 3)."""
    return X - dot_fp32(X, dot_fp32(E, X))


@triton.jit
def _pairs(x, N: tl.constexpr, SIZE: tl.constexpr):
    """Split per-token values [2N, SIZE] or [N * 2 * SIZE] into even and odd blocks, each [N, SIZE]."""
    return tl.split(tl.permute(tl.reshape(x, [N, 2, SIZE]), (0, 2, 1)))


@triton.jit
def _within(log, distance, position, DOCUMENTS: tl.constexpr):
    """Return 2^log of two tokens, `distance` apart, and zero if the first is not in the document of the second, at `position`."""
    if DOCUMENTS:
        log = tl.where(distance <= position, log, float("-inf"))
    return exp2(log)


@triton.jit(do_not_specialize=["T", "NT"])
def prepare_kernel(
    q, k, g, beta, A, P, G, positions, cu, chunk_start, chunk_sequence, scale, T, NT,
    H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, VARLEN: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    i_c, i_h = tl.program_id(1), tl.program_id(0)
    start, end = chunk_span(i_c, cu, chunk_start, chunk_sequence, T, NT, VARLEN)
    if start < end:
        t = tl.arange(0, 64)
        valid = start + t < end
        stride = HK * K
        k += (start * HK + i_h // (H // HK)) * K
        q += (start * HK + i_h // (H // HK)) * K
        g_t = tl.load(g + (start + t) * H + i_h, mask=valid, other=0.0).to(tl.float32)
        b_t = tl.load(beta + (start + t) * H + i_h, mask=valid, other=0.0).to(tl.float32)
        b_t = tl.where(valid, at_least(b_t, k.dtype.element_ty), 0.0)
        tile = i_c.to(tl.int64) * H + i_h
        position = t  # without documents, every token sees all before it
        if DOCUMENTS:
            position = position_of(positions, start + t, end)
            # a document's first token decays no state
            G_t = sum_in_document(tl.where(position == 0, 0.0, g_t), position == 0, False) * LOG2E
            store_decays(G, tile, G_t, position, position_of(positions, start + 63, end))
        else:
            G_t = tl.cumsum(g_t, 0) * LOG2E
            tl.store(G + tile * 64 + t, G_t)

        scores = tl.zeros([64, 64], tl.float32)
        q_tiles, k_tiles = load_tiles(q, t, valid, stride, K), load_tiles(k, t, valid, stride, K)
        for i in tl.static_range(tile_count(K)):
            scores = tl.dot(q_tiles[i], tl.trans(k_tiles[i]), scores, input_precision="ieee")
        earlier = t[:, None] - t[None, :]
        between = tl.where(earlier >= 0, G_t[:, None] - G_t[None, :], float("-inf"))
        scores = scores * _within(between, earlier, position[:, None], DOCUMENTS) * scale
        tl.store(P + tile * 4096 + t[:, None] * 64 + t[None, :], scores.to(P.dtype.element_ty))

        # the four diagonal 16-blocks, to their inverses
        r = tl.arange(0, 16)
        four, two, half = tl.arange(0, 4), tl.arange(0, 2), tl.arange(0, 32)
        rows = four[:, None] * 16 + r[None, :]
        G4, b4, position4 = tl.reshape(G_t, [4, 16]), tl.reshape(b_t, [4, 16]), tl.reshape(position, [4, 16])
        N = _key_products(k, start, end, rows, rows, stride, K)
        distance = (r[:, None] - r[None, :])[None, :, :]
        between = tl.where(distance > 0, G4[:, :, None] - G4[:, None, :], float("-inf"))
        N *= _within(between, distance, position4[:, :, None], DOCUMENTS) * b4[:, :, None]
        same2 = (r[:, None] // 2 == r[None, :] // 2)[None, :, :]
        same4 = (r[:, None] // 4 == r[None, :] // 4)[None, :, :]
        same8 = (r[:, None] // 8 == r[None, :] // 8)[None, :, :]
        X = tl.where((r[:, None] == r[None, :])[None, :, :], 1.0, 0.0) - tl.where(same2, N, 0.0)
        X = _merge(X, tl.where(same4 & (same2 == 0), N, 0.0))
        X = _merge(X, tl.where(same8 & (same4 == 0), N, 0.0))
        X = _merge(X, tl.where(same8, 0.0, N))

        # 16-blocks to 32-blocks, two at once
        X_even, X_odd = tl.split(tl.permute(tl.reshape(X, [2, 2, 16, 16]), (0, 2, 3, 1)))
        G_even, G_odd = _pairs(G_t, 2, 16)
        b_even, b_odd = _pairs(b_t, 2, 16)
        _, position_odd = _pairs(position, 2, 16)
        rows = two[:, None] * 32 + r[None, :]
        E = _key_products(k, start, end, rows + 16, rows, stride, K)
        between = G_odd[:, :, None] - G_even[:, None, :]
        E *= _within(between, distance + 16, position_odd[:, :, None], DOCUMENTS) * b_odd[:, :, None]
        M = -dot_fp32(X_odd, dot_fp32(E, X_even))
        top = tl.reshape(tl.permute(tl.join(X_even, tl.zeros_like(M)), (0, 1, 3, 2)), [2, 16, 32])
        bottom = tl.reshape(tl.permute(tl.join(M, X_odd), (0, 1, 3, 2)), [2, 16, 32])
        X32 = tl.reshape(tl.permute(tl.join(top, bottom), (0, 3, 1, 2)), [2, 32, 32])

        # 32-blocks to the whole
        X_low, X_high = tl.split(tl.permute(X32, (1, 2, 0)))
        G_low, G_high = tl.split(tl.trans(tl.reshape(G_t, [2, 32])))
        b_low, b_high = tl.split(tl.trans(tl.reshape(b_t, [2, 32])))
        _, position_high = tl.split(tl.trans(tl.reshape(position, [2, 32])))
        E = tl.reshape(_key_products(k, start, end, half[None, :] + 32, half[None, :], stride, K), [32, 32])
        distance = 32 + half[:, None] - half[None, :]
        E *= _within(G_high[:, None] - G_low[None, :], distance, position_high[:, None], DOCUMENTS) * b_high[:, None]
        M = -dot_fp32(X_high, dot_fp32(E, X_low))

        at = A + tile * 4096 + half[:, None] * 64 + half[None, :]
        tl.store(at, (X_low * b_low[None, :]).to(A.dtype.element_ty))
        tl.store(at + 32, tl.zeros([32, 32], A.dtype.element_ty))
        tl.store(at + 32 * 64, (M * b_low[None, :]).to(A.dtype.element_ty))
        tl.store(at + 32 * 64 + 32, (X_high * b_high[None, :]).to(A.dtype.element_ty))
