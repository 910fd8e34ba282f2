"""Oracle of `rmsnorm` in plain torch. Source: B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019."""

import torch
import torch.nn.functional as F


def rmsnorm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool = False) -> torch.Tensor:
    """See `hybrid_kernels.rmsnorm.rmsnorm`. Computes in fp32, or in fp64 for fp64 inputs."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = 1 + weight.to(compute) if zero_centered else weight.to(compute)
    return F.rms_norm(x.to(compute), (x.shape[-1],), scale, eps).to(x.dtype)


def residual_rmsnorm_torch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, zero_centered: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `hybrid_kernels.rmsnorm.residual_rmsnorm`."""
    stream = x if residual is None else x + residual
    return stream, rmsnorm_torch(stream, weight, eps, zero_centered)
