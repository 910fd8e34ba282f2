"""head_norm_rope: from attention's packed projection to q, k, v and gate, by RMSNorm over each head and rotary embedding.

Suffixes of tensor names: s tokens, b batch, w width of the packed projection, h heads, d channels of a head, r channels of a
head that are rotated.
"""

import torch

from hybrid_kernels.dispatch import Choice, choose, triton_unsupported_reason
from hybrid_kernels.head_norm_rope.reference import head_norm_rope_torch

__all__ = ["explain", "head_norm_rope"]


def head_norm_rope(
    packed_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1r: torch.Tensor | None,
    *,
    num_heads: int,
    num_groups: int,
    eps: float,
    gated: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Apply RMSNorm over each head of q and k, then RoPE to the first r channels of each. Differentiable.

    Computes in fp32. Each direction is one kernel that touches every element once.

    Args:
        packed_sbw: this rank's projection [q | k | v], heads in order; with `gated` [q | k | v | gate], gate as wide as q.
        q_weight, k_weight: [d], by which normalised heads are multiplied.
        angles_sb1r: fp32, [s, 1, 1, r] for all sequences or [s, b, 1, r] for each. Both halves of r hold the same r / 2 angles, and
            only the first half is read. r is at most d. Not differentiable. None: no rotary embedding.
        num_heads: heads of q.
        num_groups: heads of k, and of v.
        eps: added to the mean squares.
        gated: the projection ends with a gate. It is returned as a slice, because slicing it outside would cost autograd another
            pass over a gradient as wide as `packed_sbw`.

    Returns:
        q_sbhd, k_sbhd and v_sbhd, contiguous, in packed_sbw's dtype; the gate [s, b, num_heads * d], or None.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
    """
    _check(packed_sbw, q_weight, k_weight, angles_sb1r, num_heads * (2 if gated else 1) + 2 * num_groups)
    if explain(packed_sbw, q_weight, k_weight, angles_sb1r, backend=backend).backend == "triton":
        from hybrid_kernels.head_norm_rope.backends.triton.op import head_norm_rope_triton as run
    else:
        run = head_norm_rope_torch
    return run(
        packed_sbw, q_weight, k_weight, angles_sb1r,
        num_heads=num_heads, num_groups=num_groups, eps=eps, gated=gated,
    )  # fmt: skip


def explain(
    packed_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1r: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> Choice:
    """Return which backend a call would run, and why."""
    backends = {
        "triton": lambda: triton_unsupported_reason(packed_sbw, q_weight, k_weight, angles_sb1r),
        "torch": lambda: None,
    }
    return choose("head_norm_rope", backends, backend)


def _check(
    packed_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1r: torch.Tensor | None,
    heads: int,
) -> None:
    if q_weight.dim() != 1 or k_weight.shape != q_weight.shape:
        raise ValueError(
            f"q_weight, k_weight: expected [d] both, got {tuple(q_weight.shape)} and {tuple(k_weight.shape)}"
        )
    d = len(q_weight)
    if packed_sbw.dim() != 3 or packed_sbw.shape[-1] != heads * d:
        raise ValueError(f"packed_sbw: expected [s, b, {heads} * {d}], got {tuple(packed_sbw.shape)}")
    if angles_sb1r is None:
        return
    length, batch, _ = packed_sbw.shape
    *places, turned = angles_sb1r.shape
    if places not in ([length, 1, 1], [length, batch, 1]) or turned % 2 or not 0 < turned <= d:
        raise ValueError(
            f"angles_sb1r: expected [{length}, 1 or {batch}, 1, an even number up to {d}], got {tuple(angles_sb1r.shape)}"
        )
