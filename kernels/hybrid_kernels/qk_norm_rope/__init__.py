"""qk_norm_rope: from attention's packed projection to q, k and v: RMSNorm over the whole q and k, rotary embedding."""

import torch

from ..dispatch import Choice, choose, missing_for_triton
from .reference import qk_norm_rope_torch

__all__ = ["explain", "qk_norm_rope"]


def qk_norm_rope(
    qkv_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_s11d: torch.Tensor | None,
    *,
    head_dim: int,
    true_widths: tuple[int, int],
    eps: float,
    group=None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm over the whole q and the whole k projection, before the split into heads, then RoPE. Differentiable.

    fp32 inside. Under tensor parallelism the mean squares are over all ranks' heads: one all-reduce of two numbers a
    token in each direction. Where `group` is one rank, each direction is one kernel that touches every element once.

    Args:
        qkv_sbw: [s, b, (heads + 2 * groups) * d] this rank's projection, [q | k | v], heads in order.
        q_weight: [heads * d]. k_weight: [groups * d]: this rank's part of the norms' weights.
        angles_s11d: [s, 1, 1, d] fp32 as megatron-core's `RotaryEmbedding` gives them: both halves of d hold the same
            d / 2 angles, of which only the first half is read. None: no rotary embedding (NoPE). Not differentiable.
        head_dim: d.
        true_widths: of q and k over all ranks, without dummy heads (whose entries are zero): what the means are over.
        eps: added to the mean squares.
        group: the torch.distributed group that shares the heads; None: one rank.

    Returns:
        q [s, b, heads, d], k and v [s, b, groups, d], contiguous, in qkv's dtype.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    _check(qkv_sbw, q_weight, k_weight, angles_s11d, head_dim)
    choice = explain(qkv_sbw, q_weight, k_weight, angles_s11d, backend=backend)
    options = dict(head_dim=head_dim, true_widths=true_widths, eps=eps, group=group)
    if choice.backend == "triton":
        from .triton_op import qk_norm_rope_triton

        return qk_norm_rope_triton(qkv_sbw, q_weight, k_weight, angles_s11d, **options)
    return qk_norm_rope_torch(qkv_sbw, q_weight, k_weight, angles_s11d, **options)


def explain(qkv_sbw, q_weight, k_weight, angles_s11d=None, *, backend: str | None = None, **_) -> Choice:
    """Which backend a call would run, and why; takes the arguments of `qk_norm_rope`."""
    backends = {
        "triton": lambda: missing_for_triton(qkv_sbw, q_weight, k_weight, angles_s11d),
        "torch": lambda: None,
    }
    return choose("qk_norm_rope", backends, backend)


def _check(qkv, q_weight, k_weight, angles, head_dim) -> None:
    if qkv.dim() != 3 or qkv.shape[-1] != len(q_weight) + 2 * len(k_weight):
        expected = f"[s, b, {len(q_weight)} + 2 * {len(k_weight)}]"
        raise ValueError(f"qkv_sbw: expected {expected} for these weights, got {tuple(qkv.shape)}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.dim() != 1 or len(weight) % head_dim or head_dim % 2:
            raise ValueError(f"{name}: expected whole heads of an even head_dim {head_dim}, got {tuple(weight.shape)}")
    if angles is not None and tuple(angles.shape) != (qkv.shape[0], 1, 1, head_dim):
        raise ValueError(f"angles_s11d: expected {(qkv.shape[0], 1, 1, head_dim)}, got {tuple(angles.shape)}")
