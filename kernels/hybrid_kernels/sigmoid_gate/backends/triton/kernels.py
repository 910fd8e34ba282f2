"""Kernels of `sigmoid_gate`, one for each direction. A program takes BLOCK channels of one token."""

import triton
import triton.language as tl

from hybrid_kernels.triton_support import sigmoid


@triton.jit
def _places(B, width, gate_s, gate_b, BLOCK: tl.constexpr):
    """Return offsets in x and in the gate, and the mask of channels that exist."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return token * width + column, token // B * gate_s + token % B * gate_b + column, column < width


@triton.jit
def forward_kernel(x, gate, y, B, width, gate_s, gate_b, BLOCK: tl.constexpr):
    at, gate_at, mask = _places(B, width, gate_s, gate_b, BLOCK)
    value = tl.load(x + at, mask=mask).to(tl.float32)
    value *= sigmoid(tl.load(gate + gate_at, mask=mask).to(tl.float32))
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(x, gate, dy, dx, dgate, B, width, gate_s, gate_b, BLOCK: tl.constexpr):
    at, gate_at, mask = _places(B, width, gate_s, gate_b, BLOCK)
    share = sigmoid(tl.load(gate + gate_at, mask=mask).to(tl.float32))
    d = tl.load(dy + at, mask=mask).to(tl.float32) * share
    tl.store(dx + at, d.to(dx.dtype.element_ty), mask=mask)
    d *= tl.load(x + at, mask=mask).to(tl.float32) * (1.0 - share)
    tl.store(dgate + at, d.to(dgate.dtype.element_ty), mask=mask)
