"""Oracle of `gated_rmsnorm` in plain torch. Source: transformers `olmo_hybrid` (OlmoHybridRMSNormGated).

With the sigmoid it is that of transformers `kimi_linear` (KimiLinearRMSNormGated).
"""

import torch
import torch.nn.functional as F


def gated_rmsnorm_torch(
    o_bshd: torch.Tensor, gate_sbw: torch.Tensor, weight: torch.Tensor, eps: float, activation: str = "silu"
) -> torch.Tensor:
    """See `hybrid_kernels.gated_rmsnorm.gated_rmsnorm`. Computes in fp32, or in fp64 for fp64 inputs."""
    compute = torch.float64 if o_bshd.dtype == torch.float64 else torch.float32
    o = o_bshd.to(compute)
    normed = o * torch.rsqrt((o * o).mean(-1, keepdim=True) + eps) * weight.to(compute)
    gate = gate_sbw.to(compute)
    y_sbw = normed.transpose(0, 1).flatten(2) * (F.silu(gate) if activation == "silu" else torch.sigmoid(gate))
    return y_sbw.to(o_bshd.dtype).contiguous()
