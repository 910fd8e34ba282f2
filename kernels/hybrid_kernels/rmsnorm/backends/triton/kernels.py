"""Kernels of `rmsnorm`. A tile is R rows of N channels, padded to BLOCK, a power of two.

The backward pass has two stages. Each program of the first sums the weight's gradient over its rows, in a fixed order; the
second sums over the programs.
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_support import sum_over_parts


@triton.jit
def _load(x, row, rows, N: tl.constexpr, BLOCK: tl.constexpr):
    """Load x[row, 0:N] in its own dtype. Padding and rows from `rows` on are zero."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < N)
    return tl.load(x + row.to(tl.int64)[:, None] * N + column, mask=mask, other=0.0)


@triton.jit
def _store(x, row, rows, value, N: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows)[:, None] & (column < N)
    tl.store(x + row.to(tl.int64)[:, None] * N + column, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _load_weight(weight, N: tl.constexpr, BLOCK: tl.constexpr, ZERO_CENTERED: tl.constexpr):
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < N, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if ZERO_CENTERED:
        w += 1.0
    return w[None, :]


@triton.jit
def rmsnorm_forward_kernel(
    x, residual, weight, stream, y, rstd, rows, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, ADD: tl.constexpr, ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """Write y and rstd [rows]. With ADD, also the stream x + residual, which is what is normalised."""
    eps = tl.full([], eps, tl.float32)  # torch.compile passes Python's floats as fp64
    row = tl.program_id(0) * R + tl.arange(0, R)
    loaded = _load(x, row, rows, N, BLOCK)
    if ADD:
        total = loaded.to(tl.float32) + _load(residual, row, rows, N, BLOCK).to(tl.float32)
        loaded = total.to(stream.dtype.element_ty)
        _store(stream, row, rows, loaded, N, BLOCK)
    w = _load_weight(weight, N, BLOCK, ZERO_CENTERED)
    value = loaded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / N + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    _store(y, row, rows, value * scale[:, None] * w, N, BLOCK)


@triton.jit
def rmsnorm_backward_kernel(
    x, weight, rstd, dy, dstream, dx, partial, rows,
    N: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, ADD: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """Write dx, and in partial [programs, N] the weight's gradient over this program's rows. With ADD, dx includes dstream.

    STAGES - 1 tiles are copied to shared memory ahead of the one in work.
    """
    w = _load_weight(weight, N, BLOCK, ZERO_CENTERED)
    dw = tl.zeros([R, BLOCK], tl.float32)
    for start in tl.range(tl.program_id(0) * R, rows, tl.num_programs(0) * R, num_stages=STAGES):
        row = start + tl.arange(0, R)
        value, grad = _load(x, row, rows, N, BLOCK).to(tl.float32), _load(dy, row, rows, N, BLOCK).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        normed, weighted = value * scale, grad * w
        dw += grad * normed
        along = (tl.sum(normed * weighted, 1) / N)[:, None]
        result = scale * (weighted - normed * along)
        if ADD:
            result += _load(dstream, row, rows, N, BLOCK).to(tl.float32)
        _store(dx, row, rows, result, N, BLOCK)
    program = tl.program_id(0) + tl.arange(0, 1)
    _store(partial, program, tl.num_programs(0), tl.sum(dw, 0)[None, :], N, BLOCK)


@triton.jit
def rmsnorm_sum_kernel(partial, dweight, programs, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the sums of partial [programs, N] over the programs, COLUMNS of them in each program of this kernel."""
    column, total = sum_over_parts(partial, programs, N, ROWS, COLUMNS)
    tl.store(dweight + column, total.to(dweight.dtype.element_ty), mask=column < N)
