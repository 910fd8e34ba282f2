"""gated_rmsnorm: per-head RMSNorm of the delta rule's output, times SiLU or sigmoid of the gate, in megatron's layout.

Suffixes of tensor names: b batch, s tokens, h heads, d channels of a head, w = h * d.
"""

import torch

from hybrid_kernels.dispatch import Choice, choose, triton_unsupported_reason
from hybrid_kernels.gated_rmsnorm.reference import gated_rmsnorm_torch

__all__ = ["explain", "gated_rmsnorm"]
ACTIVATIONS = ("silu", "sigmoid")


def gated_rmsnorm(
    o_bshd: torch.Tensor,
    gate_sbw: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> torch.Tensor:
    """Return y = RMSNorm_per_head(o) * weight * activation(gate), computed in fp32. Differentiable.

    Args:
        gate_sbw: may be a slice of a wider tensor. Its last dimension must be contiguous.
        weight: [d].
        eps: added to the mean square of each head's d values.
        activation: "silu" or "sigmoid".

    Returns:
        y_sbw, contiguous, in o's dtype.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
    """
    if o_bshd.dim() != 4:
        raise ValueError(f"o_bshd: expected [b, s, h, d], got shape {tuple(o_bshd.shape)}")
    b, s, h, d = o_bshd.shape
    if tuple(gate_sbw.shape) != (s, b, h * d):
        raise ValueError(f"gate_sbw: expected {(s, b, h * d)} for o {tuple(o_bshd.shape)}, got {tuple(gate_sbw.shape)}")
    if tuple(weight.shape) != (d,):
        raise ValueError(f"weight: expected [{d}], got {tuple(weight.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    choice = explain(o_bshd, gate_sbw, weight, backend=backend)
    if choice.backend == "triton":
        from hybrid_kernels.gated_rmsnorm.backends.triton.op import gated_rmsnorm_triton

        return gated_rmsnorm_triton(o_bshd, gate_sbw, weight, eps, activation)
    return gated_rmsnorm_torch(o_bshd, gate_sbw, weight, eps, activation)


def explain(
    o_bshd: torch.Tensor, gate_sbw: torch.Tensor, weight: torch.Tensor, *, backend: str | None = None
) -> Choice:
    """Return which backend a call would run, and why."""
    backends = {"triton": lambda: _triton_unsupported_reason(o_bshd, gate_sbw, weight), "torch": lambda: None}
    return choose("gated_rmsnorm", backends, backend)


def _triton_unsupported_reason(o_bshd: torch.Tensor, gate_sbw: torch.Tensor, weight: torch.Tensor) -> str | None:
    reason = triton_unsupported_reason(o_bshd, gate_sbw, weight)
    if reason is None:
        from hybrid_kernels.gated_rmsnorm.backends.triton.op import unsupported_reason

        reason = unsupported_reason(o_bshd.shape[-1])
    return reason
