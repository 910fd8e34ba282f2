"""The oracle of `qk_norm_rope` in plain torch. Sources: transformers `Olmo3Attention`; megatron-core's rotary embedding."""

import torch
import torch.distributed as dist


class _SumOverRanks(torch.autograd.Function):
    """Sum over a group's ranks, each of which goes on with the sum in its own way: gradients are summed as well."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def rotate(x_sbhd: torch.Tensor, angles_s11d: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of [s, b, heads, d]: pairs (x_i, x_{i + d/2}) turned by angle i, in x's precision."""
    half = x_sbhd.shape[-1] // 2
    angles = angles_s11d[..., :half].to(x_sbhd.dtype)
    low, high = x_sbhd.split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


def qk_norm_rope_torch(qkv_sbw, q_weight, k_weight, angles_s11d, *, head_dim, true_widths, eps, group=None):
    """See `hybrid_kernels.qk_norm_rope.qk_norm_rope`, whose arguments and results these are."""
    compute = torch.float64 if qkv_sbw.dtype == torch.float64 else torch.float32
    widths = len(q_weight), len(k_weight), len(k_weight)
    q, k, v = qkv_sbw.split(widths, dim=-1)
    q, k = q.to(compute), k.to(compute)
    squares = torch.stack((q.square().sum(-1), k.square().sum(-1)), dim=-1)
    if group is not None and group.size() > 1:
        squares = _SumOverRanks.apply(squares, group)
    results = []
    for i, (x, weight) in enumerate(((q, q_weight), (k, k_weight))):
        x = x * torch.rsqrt(squares[..., i : i + 1] / true_widths[i] + eps) * weight.to(compute)
        x = x.unflatten(-1, (-1, head_dim))
        results.append((x if angles_s11d is None else rotate(x, angles_s11d)).to(qkv_sbw.dtype))
    return *results, v.unflatten(-1, (-1, head_dim)).contiguous()
