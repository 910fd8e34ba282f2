"""Documents inside a chunk: which tokens see each other, from the position of each token in its document.

Chunks need not begin where documents do. Token i sees token j before it if i - j is at most i's position, and the state before the
chunk if its position is greater than its place in the chunk. Tokens past the end of a row continue its last document.

`prepare` writes what follows for the scans: with documents, G has three rows per chunk and head, of 64 logarithms of decays each.
They are those since the document's first token in the chunk, since the state before the chunk, and until the state after it.
"""

import triton
import triton.language as tl


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
