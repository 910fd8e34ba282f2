"""Launches and autograd of `sigmoid_gate` in Triton."""

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from hybrid_kernels import triton_support  # noqa: F401 - repairs Triton's interpreter before the kernels are defined
from hybrid_kernels.custom_op import OptionalTensors, custom_op
from hybrid_kernels.sigmoid_gate.backends.triton.kernels import backward_kernel, forward_kernel

BLOCK, WARPS = 2048, 4


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return x.shape[0] * x.shape[1], triton.cdiv(x.shape[2], BLOCK)


def _forward_like(x: torch.Tensor, gate: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty_like(x)]


@custom_op("sigmoid_gate_forward", _forward_like)
def _forward(x: torch.Tensor, gate: torch.Tensor) -> OptionalTensors:
    y = torch.empty_like(x)
    forward_kernel[_grid(x)](x, gate, y, x.shape[1], x.shape[2], *gate.stride()[:2], BLOCK=BLOCK, num_warps=WARPS)
    return [y]


def _backward_like(x: torch.Tensor, gate: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty_like(x), torch.empty_like(x)]


@custom_op("sigmoid_gate_backward", _backward_like)
def _backward(x: torch.Tensor, gate: torch.Tensor, dy: torch.Tensor) -> OptionalTensors:
    """Return the gradients of x and of the gate."""
    dx, dgate = torch.empty_like(x), torch.empty_like(x)
    backward_kernel[_grid(x)](
        x, gate, dy, dx, dgate, x.shape[1], x.shape[2], *gate.stride()[:2], BLOCK=BLOCK, num_warps=WARPS
    )
    return [dx, dgate]


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor | None:
        x, gate = x.contiguous(), gate if gate.stride(-1) == 1 else gate.contiguous()
        ctx.save_for_backward(x, gate)
        return _forward(x, gate)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx, dgate = _backward(*ctx.saved_tensors, grads[0].contiguous())
        return dx, dgate


def sigmoid_gate_triton(x_sbw: torch.Tensor, gate_sbw: torch.Tensor) -> torch.Tensor:
    """See `hybrid_kernels.sigmoid_gate.sigmoid_gate`."""
    y: torch.Tensor = _SigmoidGate.apply(x_sbw, gate_sbw)
    return y
