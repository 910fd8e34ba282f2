"""Launches and autograd of `gated_rmsnorm` in Triton."""

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from hybrid_kernels.custom_op import OptionalTensors, custom_op
from hybrid_kernels.gated_rmsnorm.backends.triton.kernels import backward_kernel, forward_kernel

FORWARD_ROWS, BACKWARD_ROWS = 32, 16
"""Rows (one head of one token each) per step."""
BACKWARD_PROGRAMS = 132 * 8
"""Each program sums the gradient of the weight over its rows."""
HEAD_DIMS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512)


def unsupported_reason(head_dim: int) -> str | None:
    """Return why these kernels cannot run heads of this size, or None."""
    return None if head_dim in HEAD_DIMS else f"value_head_dim {head_dim} is none of {HEAD_DIMS}"


def _forward_like(
    o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, activation: str
) -> list[torch.Tensor]:
    batch, length, heads, dim = o.shape
    return [o.new_empty(length, batch, heads * dim)]


@custom_op("gated_rmsnorm_forward", _forward_like)
def _forward(o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, activation: str) -> OptionalTensors:
    batch, length, heads, dim = o.shape
    out = _forward_like(o, gate, weight, eps, activation)
    rows = batch * length * heads
    forward_kernel[(triton.cdiv(rows, FORWARD_ROWS),)](
        o, gate, weight, *out, rows, batch, length, heads, gate.stride(0), gate.stride(1), eps, D=dim,
        R=FORWARD_ROWS, SIGMOID=activation == "sigmoid", num_warps=4,
    )  # fmt: skip
    return [*out]


def _backward_like(
    o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, eps: float, activation: str
) -> list[torch.Tensor]:
    return [torch.empty_like(o), torch.empty_like(dy), torch.empty_like(weight)]


@custom_op("gated_rmsnorm_backward", _backward_like)
def _backward(
    o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor, eps: float, activation: str
) -> OptionalTensors:
    """Return the gradients of o, gate and weight."""
    batch, length, heads, dim = o.shape
    rows = batch * length * heads
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(rows, BACKWARD_ROWS))
    do, dgate = torch.empty_like(o), torch.empty_like(dy)
    dweight = torch.empty(programs, dim, device=o.device, dtype=torch.float32)
    backward_kernel[(programs,)](
        o, gate, weight, dy, do, dgate, dweight, rows, batch, length, heads, gate.stride(0), gate.stride(1),
        eps, triton.cdiv(rows, programs * BACKWARD_ROWS), D=dim, R=BACKWARD_ROWS,
        SIGMOID=activation == "sigmoid", num_warps=4,
    )  # fmt: skip
    return [do, dgate, dweight.sum(0).to(weight.dtype)]


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, activation: str
    ) -> torch.Tensor | None:
        o, weight = o.contiguous(), weight.contiguous()
        gate = gate if gate.stride(-1) == 1 else gate.contiguous()
        (y,) = _forward(o, gate, weight, eps, activation)
        ctx.save_for_backward(o, gate, weight)
        ctx.eps, ctx.activation = eps, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        return *_backward(*ctx.saved_tensors, dy.contiguous(), ctx.eps, ctx.activation), None, None


def gated_rmsnorm_triton(
    o_bshd: torch.Tensor, gate_sbw: torch.Tensor, weight: torch.Tensor, eps: float, activation: str
) -> torch.Tensor:
    """See `hybrid_kernels.gated_rmsnorm.gated_rmsnorm`."""
    y: torch.Tensor = _GatedRMSNorm.apply(o_bshd, gate_sbw, weight, eps, activation)
    return y
