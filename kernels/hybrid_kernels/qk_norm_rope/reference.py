"""Oracle of `qk_norm_rope` in plain torch. Sources: transformers `Olmo3Attention`; megatron-core's rotary embedding."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hybrid_kernels.collectives import AllReduce


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks that use the sum differently: the backward pass sums their gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, all_reduce: AllReduce) -> torch.Tensor:
        ctx.all_reduce = all_reduce
        x = x.clone()
        all_reduce(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grads[0].contiguous().clone()
        ctx.all_reduce(grad)
        return grad, None


def rotate(x_sbhd: torch.Tensor, angles_sb1d: torch.Tensor) -> torch.Tensor:
    """Apply rotary embedding in x's precision: rotate each pair (x_i, x_{i + d/2}) by angle i."""
    half = x_sbhd.shape[-1] // 2
    angles = angles_sb1d[..., :half].to(x_sbhd.dtype)
    low, high = x_sbhd.split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def qk_norm_rope_torch(
    qkv_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1d: torch.Tensor | None,
    *,
    head_dim: int,
    true_widths: tuple[int, int],
    eps: float,
    all_reduce: AllReduce | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `hybrid_kernels.qk_norm_rope.qk_norm_rope`."""
    compute = torch.float64 if qkv_sbw.dtype == torch.float64 else torch.float32
    q, k, v = qkv_sbw.split((len(q_weight), len(k_weight), len(k_weight)), dim=-1)
    q, k = q.to(compute), k.to(compute)
    squares = torch.stack((q.square().sum(-1), k.square().sum(-1)), dim=-1)
    if all_reduce is not None:
        squares = _SumOverRanks.apply(squares, all_reduce)
    results = []
    for i, (x, weight) in enumerate(((q, q_weight), (k, k_weight))):
        x = x * torch.rsqrt(squares[..., i : i + 1] / true_widths[i] + eps) * weight.to(compute)
        x = x.unflatten(-1, (-1, head_dim))
        results.append((x if angles_sb1d is None else rotate(x, angles_sb1d)).to(qkv_sbw.dtype))
    return results[0], results[1], v.unflatten(-1, (-1, head_dim)).contiguous()
