"""rmsnorm: RMSNorm over the last dimension, alone or together with the residual stream that it reads.

Every row of the last dimension, of n channels, is normalised on its own. Leading dimensions are free.
"""

import torch

from hybrid_kernels.dispatch import Choice, choose, triton_unsupported_reason
from hybrid_kernels.rmsnorm.reference import residual_rmsnorm_torch, rmsnorm_torch

__all__ = ["explain", "residual_rmsnorm", "rmsnorm"]


def rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, zero_centered: bool = False, backend: str | None = None
) -> torch.Tensor:
    """Return x / rms(x) * weight, computed in fp32. Differentiable. It saves x and, in Triton, one number per row.

    Args:
        x: [..., n].
        weight: [n], in any dtype that x may have.
        eps: added to the mean square of each row.
        zero_centered: multiply by 1 + weight instead.

    Returns:
        y [..., n], contiguous, in x's dtype.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
    """
    _check(x, None, weight)
    if explain(x, weight, backend=backend).backend == "triton":
        from hybrid_kernels.rmsnorm.backends.triton.op import rmsnorm_triton

        return rmsnorm_triton(x, weight, eps, zero_centered)
    return rmsnorm_torch(x, weight, eps, zero_centered)


def residual_rmsnorm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    zero_centered: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual stream and its norm: (x + residual, rmsnorm(x + residual)). Differentiable.

    The sum is rounded to x's dtype before it is normalised. The backward pass adds the gradient of the stream in the kernel that
    writes the gradient of the norm, so that autograd has nothing to add.

    Args:
        x: [..., n].
        residual: as x. None: the stream is x itself, and is returned without a copy.
        weight, eps, zero_centered: as in `rmsnorm`.

    Returns:
        stream and y, both [..., n] in x's dtype.

    Raises:
        ValueError: the shapes or the dtypes of x and residual do not match, or the requested backend cannot run here.
    """
    _check(x, residual, weight)
    if explain(x, weight, residual, backend=backend).backend == "triton":
        from hybrid_kernels.rmsnorm.backends.triton.op import residual_rmsnorm_triton

        return residual_rmsnorm_triton(x, residual, weight, eps, zero_centered)
    return residual_rmsnorm_torch(x, residual, weight, eps, zero_centered)


def explain(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None, *, backend: str | None = None
) -> Choice:
    """Return which backend a call would run, and why."""
    backends = {"triton": lambda: _triton_unsupported_reason(x, weight, residual), "torch": lambda: None}
    return choose("rmsnorm", backends, backend)


def _triton_unsupported_reason(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> str | None:
    reason = triton_unsupported_reason(x, weight, residual)
    if reason is None:
        from hybrid_kernels.rmsnorm.backends.triton.op import unsupported_reason

        reason = unsupported_reason(x.shape[-1])
    return reason


def _check(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> None:
    if x.dim() == 0 or tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight: expected [n] for x [..., n] {tuple(x.shape)}, got {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual: expected {tuple(x.shape)} {x.dtype} as x, got {tuple(residual.shape)} {residual.dtype}"
        )
