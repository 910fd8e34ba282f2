"""gated_delta_step: one token of the gated delta rule or the KDA rule per sequence. It updates the state in place, for decoding.

Suffixes of tensor names: b batch, h value heads, g key heads, k channels of a key, v channels of a value.
"""

import torch

from hybrid_kernels.dispatch import Choice, choose, triton_unsupported_reason
from hybrid_kernels.gated_delta_step.reference import gated_delta_step_torch

__all__ = ["explain", "gated_delta_step"]


def gated_delta_step(
    q_bgk: torch.Tensor,
    k_bgk: torch.Tensor,
    v_bhv: torch.Tensor,
    g: torch.Tensor,
    beta_bh: torch.Tensor,
    state_bhkv: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute one step of `gated_delta_rule` and write the new state over the old one. Not differentiable.

    Args:
        q_bgk, k_bgk, v_bhv, g, beta_bh: the token's values, as in `gated_delta_rule` without the dimension of tokens. With g
            [b, h, k] instead of [b, h], it is a step of `kda_rule`.
        state_bhkv: contiguous, fp32 (fp64 for fp64 values). Updated in place.
        scale: multiplies q; the key head dim ** -0.5 by default.

    Returns:
        o_bhv, in v's dtype.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
    """
    _check(q_bgk, k_bgk, v_bhv, g, beta_bh, state_bhkv)
    scale = k_bgk.shape[-1] ** -0.5 if scale is None else scale
    arguments = (q_bgk, k_bgk, v_bhv, g, beta_bh, state_bhkv, scale)
    if explain(q_bgk, v_bhv, state_bhkv, backend=backend).backend == "triton":
        from hybrid_kernels.gated_delta_step.backends.triton.op import gated_delta_step_triton

        return gated_delta_step_triton(*arguments)
    return gated_delta_step_torch(*arguments)


def explain(
    q_bgk: torch.Tensor, v_bhv: torch.Tensor, state_bhkv: torch.Tensor, *, backend: str | None = None
) -> Choice:
    """Return which backend a call would run, and why."""
    backends = {"triton": lambda: triton_unsupported_reason(q_bgk, v_bhv, state_bhkv), "torch": lambda: None}
    return choose("gated_delta_step", backends, backend)


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> None:
    if q.dim() != 3 or v.dim() != 3 or q.shape != k.shape or len(q) != len(v):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k: expected [b, Hk, K] and v [b, H, V], got {shapes}")
    if v.shape[1] % k.shape[1]:
        raise ValueError(f"v has {v.shape[1]} heads, not a multiple of k's {k.shape[1]}")
    per_head, per_channel = tuple(v.shape[:2]), (*v.shape[:2], k.shape[2])
    if tuple(g.shape) not in (per_head, per_channel):
        raise ValueError(f"g: expected [b, H] = {per_head} or [b, H, K] = {per_channel}, got {tuple(g.shape)}")
    if tuple(beta.shape) != per_head:
        raise ValueError(f"beta: expected [b, H] = {per_head}, got {tuple(beta.shape)}")
    expected = (*v.shape[:2], k.shape[2], v.shape[2])
    if tuple(state.shape) != expected or not state.is_contiguous():
        raise ValueError(f"state: expected contiguous {expected}, got {tuple(state.shape)}")
    wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state.dtype != wanted:
        raise ValueError(f"state: expected {wanted} for values in {v.dtype}, got {state.dtype}")
