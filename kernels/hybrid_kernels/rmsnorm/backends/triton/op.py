"""Launches and autograd of `rmsnorm` in Triton. Every sum has a fixed order."""

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from hybrid_kernels import triton_support  # noqa: F401 - repairs Triton's interpreter before the kernels are defined
from hybrid_kernels.custom_op import OptionalTensors, custom_op
from hybrid_kernels.rmsnorm.backends.triton.kernels import (
    rmsnorm_backward_kernel,
    rmsnorm_forward_kernel,
    rmsnorm_sum_kernel,
)

LARGEST_WIDTH = 8192
TILE = 2048
"""Channels in a tile at least: short rows share one."""
FORWARD_CHANNELS, BACKWARD_CHANNELS = 1024, 512
"""Channels of a tile per warp. A warp of the backward pass holds the weight and its gradient as well."""
BACKWARD_PROGRAMS, BACKWARD_STAGES = 256, 3
"""Each program sums the gradient of the weight over its rows. Two of them share an SM at 3840 channels."""
LARGEST_STAGE = 16384
"""Bytes of a tile up to which BACKWARD_STAGES fit into shared memory, for three tensors. Wider tiles have two stages."""
SUM_ROWS, SUM_COLUMNS = 64, 32


def unsupported_reason(width: int) -> str | None:
    """Return why these kernels cannot run rows of this width, or None."""
    return None if 0 < width <= LARGEST_WIDTH else f"rows of {width} channels are not between 1 and {LARGEST_WIDTH}"


def _tile(width: int, channels_per_warp: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return dict(N=width, BLOCK=block, R=rows, num_warps=max(1, rows * block // channels_per_warp))


def _forward_like(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, zero_centered: bool
) -> OptionalTensors:
    stream = None if residual is None else torch.empty_like(x)
    return [stream, torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)]


@custom_op("rmsnorm_forward", _forward_like)
def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, zero_centered: bool
) -> OptionalTensors:
    """Return the sum of x and the residual (None without one), its norm, and the factor 1 / rms of each row."""
    stream, y, rstd = _forward_like(x, residual, weight, eps, zero_centered)
    assert rstd is not None
    rows, tile = rstd.numel(), _tile(x.shape[-1], FORWARD_CHANNELS)
    rmsnorm_forward_kernel[(triton.cdiv(rows, tile["R"]),)](
        x, x if residual is None else residual, weight, x if stream is None else stream, y, rstd, rows, eps,
        ADD=residual is not None, ZERO_CENTERED=zero_centered, **tile,
    )  # fmt: skip
    return [stream, y, rstd]


def _backward_like(
    x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, dy: torch.Tensor, dstream: torch.Tensor | None,
    zero_centered: bool,
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty_like(x), torch.empty_like(weight)]


@custom_op("rmsnorm_backward", _backward_like)
def _backward(
    x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, dy: torch.Tensor, dstream: torch.Tensor | None,
    zero_centered: bool,
) -> OptionalTensors:  # fmt: skip
    """Return the gradients of what was normalised, which includes `dstream`, and of the weight."""
    width, rows, tile = x.shape[-1], rstd.numel(), _tile(x.shape[-1], BACKWARD_CHANNELS)
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(rows, tile["R"]))
    stages = BACKWARD_STAGES if tile["R"] * tile["BLOCK"] * x.element_size() <= LARGEST_STAGE else 2
    dx, dweight = _backward_like(x, weight, rstd, dy, dstream, zero_centered)
    partial = torch.empty(programs, width, device=x.device, dtype=torch.float32)
    rmsnorm_backward_kernel[(programs,)](
        x, weight, rstd, dy, dy if dstream is None else dstream, dx, partial, rows, STAGES=stages,
        ADD=dstream is not None, ZERO_CENTERED=zero_centered, **tile,
    )  # fmt: skip
    rmsnorm_sum_kernel[(triton.cdiv(width, SUM_COLUMNS),)](
        partial, dweight, programs, N=width, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=4
    )
    return [dx, dweight]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool) -> Any:
        _, y, rstd = _forward(x, None, weight, eps, zero_centered)
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centered = zero_centered
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,) = grads
        return *_backward(*ctx.saved_tensors, dy.contiguous(), None, ctx.zero_centered), None, None


class _ResidualRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, zero_centered: bool
    ) -> Any:
        stream, y, rstd = _forward(x, residual, weight, eps, zero_centered)
        stream = x if stream is None else stream
        ctx.save_for_backward(stream, weight, rstd)
        ctx.zero_centered, ctx.adds = zero_centered, residual is not None
        return stream, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dstream, dy = (grad.contiguous() for grad in grads)
        dx, dweight = _backward(*ctx.saved_tensors, dy, dstream, ctx.zero_centered)
        return dx, dx if ctx.adds else None, dweight, None, None


def rmsnorm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool) -> torch.Tensor:
    """See `hybrid_kernels.rmsnorm.rmsnorm`."""
    y: torch.Tensor = _RMSNorm.apply(x.contiguous(), weight.contiguous(), eps, zero_centered)
    return y


def residual_rmsnorm_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `hybrid_kernels.rmsnorm.residual_rmsnorm`."""
    residual = None if residual is None else residual.contiguous()
    results: tuple[torch.Tensor, torch.Tensor] = _ResidualRMSNorm.apply(
        x.contiguous(), residual, weight.contiguous(), eps, zero_centered
    )
    return results
