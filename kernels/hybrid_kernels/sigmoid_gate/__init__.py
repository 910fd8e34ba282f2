"""sigmoid_gate: attention's output times the sigmoid of its gate, elementwise.

Suffixes of tensor names: s tokens, b batch, w channels.
"""

import torch

from hybrid_kernels.dispatch import Choice, choose, triton_unsupported_reason
from hybrid_kernels.sigmoid_gate.reference import sigmoid_gate_torch

__all__ = ["explain", "sigmoid_gate"]


def sigmoid_gate(x_sbw: torch.Tensor, gate_sbw: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Return x * sigmoid(gate), computed in fp32. Differentiable. It saves its two inputs.

    Args:
        gate_sbw: may be a slice of a wider tensor. Its last dimension must be contiguous.

    Returns:
        y_sbw, contiguous, in x's dtype.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
    """
    if x_sbw.dim() != 3 or x_sbw.shape != gate_sbw.shape:
        raise ValueError(f"gate_sbw: expected {tuple(x_sbw.shape)} as x [s, b, w], got {tuple(gate_sbw.shape)}")
    if explain(x_sbw, gate_sbw, backend=backend).backend == "triton":
        from hybrid_kernels.sigmoid_gate.backends.triton.op import sigmoid_gate_triton

        return sigmoid_gate_triton(x_sbw, gate_sbw)
    return sigmoid_gate_torch(x_sbw, gate_sbw)


def explain(x_sbw: torch.Tensor, gate_sbw: torch.Tensor, *, backend: str | None = None) -> Choice:
    """Return which backend a call would run, and why."""
    backends = {"triton": lambda: triton_unsupported_reason(x_sbw, gate_sbw), "torch": lambda: None}
    return choose("sigmoid_gate", backends, backend)
