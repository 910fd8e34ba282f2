"""Parts of both kernels that are not convolutions: the gates g and beta, and the gradient of the output gate.

They process ROWS tokens at a time, of the TOKENS of a program.
"""

import triton
import triton.language as tl

from hybrid_kernels.triton_support import load_tiles, sigmoid, store_tiles, zero_tiles


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def gates(
    raw, A_log, dt_bias, g, beta, first, T, stride, beta_max,
    HV: tl.constexpr, HEADS_POW2: tl.constexpr, DECAY: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Compute beta and g of TOKENS tokens from b and a, at raw and raw + HV."""
    head = tl.arange(0, HEADS_POW2)
    if DECAY:
        A = tl.exp(tl.load(A_log + head, mask=head < HV, other=0.0).to(tl.float32))[None, :]
        dt = tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)[None, :]
    for block in range(TOKENS // ROWS):
        t = (first + block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (t < T)[:, None] & (head < HV)[None, :]
        at, gate_at = t[:, None] * stride + head[None, :], t[:, None] * HV + head[None, :]
        b = tl.load(raw + at, mask=mask, other=0.0).to(tl.float32)
        if DECAY:
            a = tl.load(raw + at + HV, mask=mask, other=0.0).to(tl.float32)
            tl.store(g + gate_at, -A * softplus(a + dt), mask=mask)
        tl.store(beta + gate_at, sigmoid(b) * beta_max, mask=mask)


@triton.jit
def rows_of_gate(
    dgate, dx, first, T, gate_stride, stride,
    WITH_GATE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Store the gate's gradient, or zeros, in the gate's columns."""
    for block in range(TOKENS // ROWS):
        t = (first + block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        if WITH_GATE:
            rows = load_tiles(dgate, t, t < T, gate_stride, DIM)
        else:
            rows = zero_tiles(ROWS, DIM)
        store_tiles(dx, t, t < T, stride, rows, DIM)


@triton.jit
def gates_backward(
    raw, draw, A_log, dt_bias, dg, dbeta, sums, first, T, stride, beta_max,
    HV: tl.constexpr, HEADS_POW2: tl.constexpr, DECAY: tl.constexpr, PADDING: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Store the gradients of b and a (at raw and raw + HV), zeros in the padding, and this program's part of dA_log and ddt_bias."""
    head = tl.arange(0, HEADS_POW2)
    padding_at: tl.constexpr = 2 * HV if DECAY else HV
    if DECAY:
        A = tl.exp(tl.load(A_log + head, mask=head < HV, other=0.0).to(tl.float32))[None, :]
        dt = tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)[None, :]
    dA, ddt = tl.zeros([ROWS, HEADS_POW2], tl.float32), tl.zeros([ROWS, HEADS_POW2], tl.float32)
    for block in range(TOKENS // ROWS):
        t = (first + block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (t < T)[:, None] & (head < HV)[None, :]
        at, gate_at = t[:, None] * stride + head[None, :], t[:, None] * HV + head[None, :]
        b = tl.load(raw + at, mask=mask, other=0.0).to(tl.float32)
        db_t = tl.load(dbeta + gate_at, mask=mask, other=0.0).to(tl.float32)
        gate = sigmoid(b)
        tl.store(draw + at, (db_t * beta_max * gate * (1.0 - gate)).to(draw.dtype.element_ty), mask=mask)
        if PADDING > 0:
            col = tl.arange(0, triton.next_power_of_2(PADDING))
            rest = draw + t[:, None] * stride + padding_at + col[None, :]
            tl.store(rest, 0.0, mask=(t < T)[:, None] & (col < PADDING)[None, :])
        if DECAY:
            x = tl.load(raw + at + HV, mask=mask, other=0.0).to(tl.float32) + dt
            dg_t = tl.load(dg + gate_at, mask=mask, other=0.0).to(tl.float32)
            dx = -dg_t * A * sigmoid(x)
            tl.store(draw + at + HV, dx.to(draw.dtype.element_ty), mask=mask)
            dA -= dg_t * A * softplus(x)
            ddt += dx
    if DECAY:
        tl.store(sums + head, tl.sum(dA, 0), mask=head < HV)
        tl.store(sums + HV + head, tl.sum(ddt, 0), mask=head < HV)
