"""Choice of the next token of each sequence from its logits."""

import math
from dataclasses import dataclass

import torch

from megatron_hybrid.base.errors import UserError

NOT_FINITE = -1
"""Stands for the token of a sequence whose logits are not finite."""


@dataclass(frozen=True)
class Sampling:
    """Parameters of the choice of tokens. The default is greedy decoding."""

    temperature: float = 0.0
    """Divides the logits. 0: always the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens. 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens whose probabilities sum to at least this."""
    seed: int = 0
    """Sequence i of a batch draws as it would alone with seed + i."""

    def check(self) -> "Sampling":
        """Return this after checking its numbers.

        Raises:
            UserError: a number out of range.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature {self.temperature}: give a finite number of at least 0")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: give a number above 0 and up to 1")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"seed {self.seed}: give a number from 0 to 2^63 - 1")
        return self


class Sampler:
    """Chooses the tokens of a batch, step by step."""

    def __init__(self, sampling: Sampling, batch_size: int) -> None:
        self.sampling = sampling.check()
        seeds = [(sampling.seed + i) % (1 << 63) for i in range(batch_size)]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits_bv: torch.Tensor) -> torch.Tensor:
        """Return a token per sequence, or NOT_FINITE."""
        is_finite = logits_bv.isfinite().all(-1)
        if self.sampling.temperature == 0:
            return torch.where(is_finite, logits_bv.argmax(-1), NOT_FINITE)
        draws = [torch.rand((), generator=g, dtype=torch.float64) for g in self.generators]
        tokens = token_at(logits_bv, torch.stack(draws).to(logits_bv.device), self.sampling)
        return torch.where(is_finite, tokens, NOT_FINITE)


def token_at(logits_bv: torch.Tensor, draws_b: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the token that a uniform draw from [0, 1) selects from each sequence's distribution."""
    count = min(sampling.top_k or logits_bv.shape[1], logits_bv.shape[1])
    values, order = logits_bv.double().topk(count)
    # at most 0, so that small temperatures do not overflow
    probabilities = torch.softmax((values - values[:, :1]) / sampling.temperature, -1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    at = (cumulative <= draws_b[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    last = ((probabilities > 0).sum(-1, keepdim=True) - 1).clamp(
        min=0
    )  # a draw just below 1 may round to the whole sum
    return order.gather(1, torch.minimum(at, last))[:, 0]
