"""Legal values near a wrong one, for error messages."""

from collections.abc import Iterable
from difflib import SequenceMatcher

_DIVISORS_UP_TO = 10**10
"""Largest number whose divisors are searched. A configuration with a larger number is wrong and must fail fast."""


def multiple(value: int, step: int) -> int:
    """Return the positive multiple of `step` nearest to `value` (the smaller of two)."""
    below = value // step * step
    return max(step, below if value - below <= below + step - value else below + step)


def multiples(value: int, step: int) -> str:
    """Return the positive multiples of `step` below and above `value` as text: `96 or 112`."""
    below = value // step * step
    return f"{below} or {below + step}" if below > 0 else f"{step}"


def divisor(value: int, number: int) -> int:
    """Return the divisor of `number` nearest to `value` (the smaller of two)."""
    if number > _DIVISORS_UP_TO:
        return 1
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return among(value, small + [number // d for d in small])


def among(value: float, legal: Iterable[int]) -> int:
    """Return the number in `legal` nearest to `value` (the smaller of two)."""
    return min(legal, key=lambda candidate: (abs(candidate - value), candidate))


def word(wrong: str, words: Iterable[str], cutoff: float = 0.0) -> str | None:
    """Return the most similar of `words`, or None if no similarity (0 to 1) is at least `cutoff`."""

    def similarity(candidate: str) -> float:
        return SequenceMatcher(None, wrong[:99].lower(), candidate.lower()).ratio()

    best = max(words, key=similarity, default=None)
    return best if best is not None and similarity(best) >= cutoff else None
