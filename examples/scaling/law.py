"""Scaling law L(N, D) = E + A / N^alpha + B / D^beta, and what follows from it.

N is the number of parameters without embeddings and output layer, D the number of training tokens, L a loss in nats per token.
J. Hoffmann et al., "Training Compute-Optimal Large Language Models" (arXiv 2203.15556), section 3.3.
"""

import math
from dataclasses import dataclass

import numpy as np

CHINCHILLA = 20
"""Training tokens per parameter of one Chinchilla budget."""
FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""Of C = 6 N D, the cost that `compute_optimal` minimizes, as in the paper."""
_LARGEST_EXPONENT = 700.0
"""Of e, in fp64."""


@dataclass(frozen=True)
class Law:
    """Constants of a law."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters, tokens):
        """Return the loss in nats per token. Arguments may be arrays."""
        return self.E + self.A / np.power(parameters, self.alpha) + self.B / np.power(tokens, self.beta)

    def tokens_for(self, parameters: float, loss: float) -> float:
        """Return the tokens after which a model has the loss, at least 1; infinity if it never has."""
        left = loss - self.E - self.A / parameters**self.alpha
        exponent = math.log(self.B / left) / self.beta if left > 0 else math.inf
        return math.exp(max(exponent, 0.0)) if exponent < _LARGEST_EXPONENT else math.inf

    def compute_optimal(self, flops: float) -> tuple[float, float, float]:
        """Return parameters, tokens and loss of the model with the lowest loss for C = 6 N D. Both are at least 1."""
        product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        ratio = math.log(self.alpha * self.A / (self.beta * self.B))
        best = (ratio + self.beta * math.log(product)) / (self.alpha + self.beta)
        parameters = math.exp(min(max(best, 0.0), math.log(product)))
        tokens = product / parameters
        return parameters, tokens, float(self.loss(parameters, tokens))


def token_savings(base: Law, other: Law, parameters: float, tokens: float) -> float:
    """Return how many times fewer tokens `other` needs for the loss that `base` reaches at the same size.

    Args:
        tokens: tokens that `base` is trained on. The saving depends on them, because the laws have different exponents.

    Returns:
        0 if `other` never reaches the loss.
    """
    return tokens / other.tokens_for(parameters, float(base.loss(parameters, tokens)))


PAPER = {
    "transformer": Law(1.65, 108.83, 0.252, 83.45, 0.213),
    "hybrid": Law(1.60, 71.14, 0.226, 81.72, 0.219),
    "gdn": Law(1.46, 36.24, 0.183, 102.72, 0.227),
}
"""Constants of arXiv 2604.03444, section 4.1, with the digits that it prints."""
PAPER_OPTIMAL = {
    "transformer": {1e18: 3.57, 1e19: 3.12, 1e20: 2.78},
    "hybrid": {1e18: 3.46, 1e19: 3.04, 1e20: 2.71},
    "gdn": {1e18: 3.53, 1e19: 3.10, 1e20: 2.76},
}
"""Compute-optimal losses that the paper prints, by FLOPs."""
PAPER_SAVINGS = {1e9: 1.32, 7e9: 1.68, 70e9: 1.89}
"""Token savings of the hybrid that the paper prints, by parameters."""
PAPER_FIXED = {"transformer": (94.85, 89.3, 101.4), "hybrid": (83.65, 79.9, 87.0), "gdn": (90.80, 87.4, 93.3)}
"""B with alpha = beta = 0.22 and its 95% interval."""
