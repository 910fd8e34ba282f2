"""Token savings between the endpoints of a ladder, without a law: the log of the tokens is interpolated linearly in the loss."""

import math
from collections.abc import Sequence
from itertools import pairwise

Curve = Sequence[tuple[int, float]]
"""Tokens and loss of the endpoints of one model, by ascending tokens."""


def tokens_at_loss(curve: Curve, loss: float) -> float | None:
    """Return the tokens after which a model has the loss, or None if the loss is not between those of its endpoints."""
    for (few, high), (many, low) in pairwise(curve):
        if low <= loss <= high:
            share = (high - loss) / (high - low) if high > low else 0.0
            return math.exp(math.log(few) + share * math.log(many / few))
    return None


def saving_at_loss(base: Curve, other: Curve, loss: float) -> float | None:
    """Return how many times fewer tokens `other` needs for a loss, or None if it is not between the endpoints of both."""
    tokens = [tokens_at_loss(curve, loss) for curve in (base, other)]
    return None if None in tokens else tokens[0] / tokens[1]


def interpolated_saving(base: Curve, other: Curve) -> float | None:
    """Return how many times fewer tokens `other` needs for the higher one of the two last losses.

    Returns:
        None if one of the two had a lower loss at its first endpoint already.
    """
    return saving_at_loss(base, other, max(base[-1][1], other[-1][1]))
