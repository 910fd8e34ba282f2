"""Oracle of `sigmoid_gate` in plain torch. Source: transformers `qwen3_5` (Qwen3_5Attention)."""

import torch


def sigmoid_gate_torch(x_sbw: torch.Tensor, gate_sbw: torch.Tensor) -> torch.Tensor:
    """See `hybrid_kernels.sigmoid_gate.sigmoid_gate`. Computes in fp32, or in fp64 for fp64 inputs."""
    compute = torch.float64 if x_sbw.dtype == torch.float64 else torch.float32
    return (x_sbw.to(compute) * torch.sigmoid(gate_sbw.to(compute))).to(x_sbw.dtype)
