"""Oracle of `head_norm_rope` in plain torch. Source: transformers `qwen3_5` (Qwen3_5Attention)."""

import torch

from hybrid_kernels.qk_norm_rope.reference import rotate


def rotate_first(x_sbhd: torch.Tensor, angles_sb1r: torch.Tensor) -> torch.Tensor:
    """Rotate the first r channels of each head."""
    turned = angles_sb1r.shape[-1]
    if turned == x_sbhd.shape[-1]:
        return rotate(x_sbhd, angles_sb1r)
    return torch.cat((rotate(x_sbhd[..., :turned], angles_sb1r), x_sbhd[..., turned:]), dim=-1)


def head_norm_rope_torch(
    packed_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1r: torch.Tensor | None,
    *,
    num_heads: int,
    num_groups: int,
    eps: float,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `hybrid_kernels.head_norm_rope.head_norm_rope`."""
    compute = torch.float64 if packed_sbw.dtype == torch.float64 else torch.float32
    d = len(q_weight)
    widths = [d * heads for heads in (num_heads, num_groups, num_groups)]
    q, k, v = packed_sbw[..., : sum(widths)].split(widths, dim=-1)
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = x.unflatten(-1, (-1, d)).to(compute)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(compute)
        results.append((x if angles_sb1r is None else rotate_first(x, angles_sb1r)).to(packed_sbw.dtype))
    gate = packed_sbw[..., sum(widths) :] if gated else None
    return results[0], results[1], v.unflatten(-1, (-1, d)).contiguous(), gate
