"""Kernels of `linear_cross_entropy`: from a chunk's logits to losses and, possibly in place, the logits' gradients.

A program takes one row.
"""

import triton
import triton.language as tl


@triton.jit
def _statistics(row, label, columns, BLOCK: tl.constexpr):
    """Return the largest logit, the sum of exp(logit - largest), and the label's logit (0 if it is not in this slice)."""
    here = (label >= 0) & (label < columns)
    label_logit = tl.load(row + label, mask=here, other=0.0).to(tl.float32)
    largest = float("-inf")
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, 0))
        sums = sums * tl.exp(largest - above) + tl.exp(x - above)
        largest = above
    return largest, tl.sum(sums, 0), label_logit


@triton.jit
def statistics_kernel(logits, labels, statistics, rows, start, columns, width, BLOCK: tl.constexpr):
    """Write the statistics [3, rows] of this rank's slice, for the other ranks."""
    i = tl.program_id(0)
    label = tl.load(labels + i) - start
    largest, total, label_logit = _statistics(logits + i.to(tl.int64) * width, label, columns, BLOCK)
    tl.store(statistics + i, largest)
    tl.store(statistics + rows + i, total)
    tl.store(statistics + 2 * rows + i, label_logit)


@triton.jit
def losses_kernel(
    logits, dlogits, labels, weights, statistics, losses, rows, start, columns, width, losses_stride, tokens, z_weight,
    RANKS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write weighted cross-entropy and z-loss of each row, and dlogits (possibly logits itself) of their mean over `tokens`.

    RANKS > 1: statistics [RANKS, 3, rows] holds the statistics of every rank. Otherwise this program reads the row for them.
    """
    i = tl.program_id(0)
    row = logits + i.to(tl.int64) * width
    label = tl.load(labels + i) - start
    if RANKS > 1:
        largest = float("-inf")
        for rank in tl.static_range(RANKS):
            largest = tl.maximum(largest, tl.load(statistics + 3 * rank * rows + i))
        total, label_logit = 0.0, 0.0
        for rank in tl.static_range(RANKS):
            theirs = statistics + 3 * rank * rows + i
            total += tl.load(theirs + rows) * tl.exp(tl.load(theirs) - largest)
            label_logit += tl.load(theirs + 2 * rows)
    else:
        largest, total, label_logit = _statistics(row, label, columns, BLOCK)
    log_z = largest + tl.log(total)
    weight = tl.load(weights + i).to(tl.float32)
    tl.store(losses + i, weight * (log_z - label_logit))
    tl.store(losses + losses_stride + i, weight * log_z * log_z)
    if GRADIENT:
        at_label = weight / tokens
        everywhere = at_label * (1.0 + 2.0 * z_weight * log_z)
        out = dlogits + i.to(tl.int64) * width
        blocks = tl.cdiv(width, BLOCK)
        for block in range(blocks):  # backward, because the cache may still hold the end of the row
            column = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(row + column, mask=column < columns, other=float("-inf"), eviction_policy="evict_first")
            d = everywhere * tl.exp(x.to(tl.float32) - log_z) - tl.where(column == label, at_label, 0.0)
            tl.store(out + column, d.to(out.dtype.element_ty), mask=column < width, eviction_policy="evict_first")


@triton.jit
def scale_kernel(x, out, scale, count, ADD: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Compute out = scale * x, or out += scale * x. In place with a scale of one, nothing is read or written."""
    factor = tl.load(scale).to(tl.float32)
    if not IN_PLACE or factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        y = factor * tl.load(x + at, mask=at < count).to(tl.float32)
        if ADD:
            y += tl.load(out + at, mask=at < count).to(tl.float32)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=at < count)
