"""gated_rmsnorm: per-head RMSNorm of the delta rule's output, times SiLU of the gate, back in megatron's layout."""

import torch

from ..dispatch import Choice, choose, missing_for_triton
from .reference import gated_rmsnorm_torch

__all__ = ["explain", "gated_rmsnorm"]


def gated_rmsnorm(
    o_bshd: torch.Tensor, gate_sbh: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None
) -> torch.Tensor:
    """y = RMSNorm_per_head(o) * weight * SiLU(gate), with fp32 arithmetic inside. Differentiable.

    Args:
        o_bshd: [b, s, H, d].
        gate_sbh: [s, b, H*d]; may be a slice of a wider tensor (its last dimension must be contiguous).
        weight: [d]. eps: added to the mean square of each head's d values.

    Returns:
        y [s, b, H*d], contiguous, in o's dtype.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    b, s, h, d = _shape(o_bshd)
    if tuple(gate_sbh.shape) != (s, b, h * d):
        raise ValueError(f"gate_sbh: expected {(s, b, h * d)} for o {tuple(o_bshd.shape)}, got {tuple(gate_sbh.shape)}")
    if tuple(weight.shape) != (d,):
        raise ValueError(f"weight: expected [{d}], got {tuple(weight.shape)}")
    choice = explain(o_bshd, gate_sbh, weight, backend=backend)
    if choice.backend == "triton":
        from .triton_op import GatedRMSNorm

        return GatedRMSNorm.apply(o_bshd, gate_sbh, weight, eps)
    return gated_rmsnorm_torch(o_bshd, gate_sbh, weight, eps)


def explain(
    o_bshd: torch.Tensor, gate_sbh: torch.Tensor, weight: torch.Tensor, eps: float = 0.0, *, backend: str | None = None
) -> Choice:
    """Which backend a call would run, and why; takes the arguments of `gated_rmsnorm`."""
    backends = {"triton": lambda: _missing_for_triton(o_bshd, gate_sbh, weight), "torch": lambda: None}
    return choose("gated_rmsnorm", backends, backend)


def _missing_for_triton(o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> str | None:
    lack = missing_for_triton(o, gate, weight)
    if lack is None:
        from .triton_op import missing

        lack = missing(o.shape[-1])
    return lack


def _shape(o_bshd: torch.Tensor) -> tuple[int, int, int, int]:
    if o_bshd.dim() != 4:
        raise ValueError(f"o_bshd: expected [b, s, H, d], got shape {tuple(o_bshd.shape)}")
    return tuple(o_bshd.shape)
