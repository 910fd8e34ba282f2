"""Oracle of `gated_delta_step` in plain torch: one iteration of the recurrence in gated_delta_rule/reference.py."""

import torch


def gated_delta_step_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """See `hybrid_kernels.gated_delta_step.gated_delta_step`. Computes in the state's dtype."""
    compute, groups = state.dtype, v.shape[1] // k.shape[1]
    q, k = (x.to(compute).repeat_interleave(groups, 1) for x in (q, k))
    state.mul_(g.to(compute).exp().reshape(*state.shape[:2], -1, 1))
    read = (state * k[..., None]).sum(-2)
    correction = (v.to(compute) - read) * beta.to(compute)[..., None]
    state.add_(k[..., None] * correction[..., None, :])
    return (scale * (state * q[..., None]).sum(-2)).to(v.dtype)
