"""Oracles of `kda_rule` in plain torch: the recurrence, and the chunked form that CPU training runs on.

Source: Kimi Linear (arXiv 2510.26692), equation 1; transformers `kimi_linear` (KimiLinearForgetGate), and fla 0.6
`naive_kda_lowerbound_gate` for the bounded gate. Both compute in fp32, or in fp64 for fp64 values, on any device under autograd.
"""

from typing import Any

import torch

from hybrid_kernels.conv_gates.reference import softplus
from hybrid_kernels.gated_delta_rule.reference import Results, gated_delta_rule_recurrent, gated_delta_rule_torch


def log_decay(
    raw_bshk: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, lower_bound: float | None = None
) -> torch.Tensor:
    """Return the log decay of each channel [b, s, H, K], in fp32 or, for fp64, in fp64.

    Args:
        raw_bshk: projection of the token. A_log: [H]. dt_bias: [H * K].
        lower_bound: None: -exp(A_log) * softplus(raw + dt_bias). Else lower_bound * sigmoid(exp(A_log) * (raw + dt_bias)).
    """
    compute = torch.float64 if raw_bshk.dtype == torch.float64 else torch.float32
    x = raw_bshk.to(compute) + dt_bias.to(compute).view(raw_bshk.shape[2:])
    rate = A_log.to(compute).exp().unsqueeze(-1)
    return -rate * softplus(x) if lower_bound is None else lower_bound * torch.sigmoid(rate * x)


def kda_rule_recurrent(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *,
    A_log: torch.Tensor | None = None, dt_bias: torch.Tensor | None = None, lower_bound: float | None = None,
    **options: Any,
) -> Results:  # fmt: skip
    """Iterate over the tokens. Arguments and results: `kda_rule`. `options`: those of `gated_delta_rule_recurrent`."""
    return gated_delta_rule_recurrent(q, k, v, _decay(g, A_log, dt_bias, lower_bound), beta, **options)


def kda_rule_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *,
    A_log: torch.Tensor | None = None, dt_bias: torch.Tensor | None = None, lower_bound: float | None = None,
    **options: Any,
) -> Results:  # fmt: skip
    """Iterate over chunks of 16 tokens. Arguments and results: `kda_rule`. `options`: those of `gated_delta_rule_torch`."""
    return gated_delta_rule_torch(q, k, v, _decay(g, A_log, dt_bias, lower_bound), beta, **options)


def _decay(
    g: torch.Tensor, A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, lower_bound: float | None
) -> torch.Tensor:
    if A_log is None or dt_bias is None:
        return g
    return log_decay(g, A_log, dt_bias, lower_bound)
