"""qk_norm_rope: from attention's packed projection to q, k and v, by RMSNorm over the whole q and k and rotary embedding.

Suffixes of tensor names: s tokens, b batch, w width of the packed projection, h heads, d channels of a head.
"""

import torch

from hybrid_kernels.collectives import AllReduce
from hybrid_kernels.dispatch import Choice, choose, triton_unsupported_reason
from hybrid_kernels.qk_norm_rope.reference import qk_norm_rope_torch

__all__ = ["explain", "qk_norm_rope"]


def qk_norm_rope(
    qkv_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1d: torch.Tensor | None,
    *,
    head_dim: int,
    true_widths: tuple[int, int],
    eps: float,
    all_reduce: AllReduce | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply RMSNorm over the whole q and the whole k projection, before the split into heads, then RoPE. Differentiable.

    Computes in fp32. Without `all_reduce`, each direction is one kernel that touches every element once.

    Args:
        qkv_sbw: this rank's projection [q | k | v], heads in order; w = (query heads + 2 * key heads) * d.
        q_weight: [query heads * d], this rank's part of the norm's weight.
        k_weight: [key heads * d], likewise.
        angles_sb1d: fp32, from megatron-core's `RotaryEmbedding`: [s, 1, 1, d] for all sequences or [s, b, 1, d] for each, where
            positions restart per document. Both halves of d hold the same d / 2 angles, and only the first half is read. Not
            differentiable. None: no rotary embedding (NoPE). A table of angles, indexed by positions, would not save reads.
        head_dim: d.
        true_widths: widths of q and k over all ranks, without dummy heads (whose entries are zero). The means divide by them.
        eps: added to the mean squares.
        all_reduce: sums a tensor over the tensor parallel ranks that share the heads. Each direction calls it once, on two
            numbers per token. None: this rank has all heads.

    Returns:
        q_sbhd, k_sbhd and v_sbhd, contiguous, in qkv's dtype.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
    """
    _check(qkv_sbw, q_weight, k_weight, angles_sb1d, head_dim)
    choice = explain(qkv_sbw, q_weight, k_weight, angles_sb1d, backend=backend)
    if choice.backend == "triton":
        from hybrid_kernels.qk_norm_rope.backends.triton.op import qk_norm_rope_triton as run
    else:
        run = qk_norm_rope_torch
    return run(
        qkv_sbw, q_weight, k_weight, angles_sb1d,
        head_dim=head_dim, true_widths=true_widths, eps=eps, all_reduce=all_reduce,
    )  # fmt: skip


def explain(
    qkv_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1d: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> Choice:
    """Return which backend a call would run, and why."""
    backends = {
        "triton": lambda: triton_unsupported_reason(qkv_sbw, q_weight, k_weight, angles_sb1d),
        "torch": lambda: None,
    }
    return choose("qk_norm_rope", backends, backend)


def _check(
    qkv_sbw: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    angles_sb1d: torch.Tensor | None,
    head_dim: int,
) -> None:
    if qkv_sbw.dim() != 3 or qkv_sbw.shape[-1] != len(q_weight) + 2 * len(k_weight):
        expected = f"[s, b, {len(q_weight)} + 2 * {len(k_weight)}]"
        raise ValueError(f"qkv_sbw: expected {expected} for these weights, got {tuple(qkv_sbw.shape)}")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight.dim() != 1 or len(weight) % head_dim or head_dim % 2:
            raise ValueError(f"{name}: expected whole heads of an even head_dim {head_dim}, got {tuple(weight.shape)}")
    length, batch, _ = qkv_sbw.shape
    expected_shapes = ((length, 1, 1, head_dim), (length, batch, 1, head_dim))
    if angles_sb1d is not None and tuple(angles_sb1d.shape) not in expected_shapes:
        expected = " or ".join(map(str, dict.fromkeys(expected_shapes)))
        raise ValueError(f"angles_sb1d: expected {expected}, got {tuple(angles_sb1d.shape)}")
