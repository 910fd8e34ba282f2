"""The legal value that a wrong one was probably meant to be."""

from collections.abc import Iterable
from difflib import SequenceMatcher

_DIVISORS_UP_TO = 10**10
"""Divisors of larger numbers are not searched: a config that holds one is wrong anyway, and must fail fast."""


def multiple(value: int, step: int) -> int:
    """The positive multiple of `step` nearest to `value` (the smaller of two)."""
    below = value // step * step
    return max(step, below if value - below <= below + step - value else below + step)


def multiples(value: int, step: int) -> str:
    """The positive multiples of `step` on either side of `value`, in words: `96 or 112`."""
    below = value // step * step
    return f"{below} or {below + step}" if below > 0 else f"{step}"


def divisor(value: int, number: int) -> int:
    """The divisor of `number` nearest to `value` (the smaller of two)."""
    if number > _DIVISORS_UP_TO:
        return 1
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return among(value, small + [number // d for d in small])


def among(value: float, legal: Iterable[int]) -> int:
    """The number of `legal` nearest to `value` (the smaller of two)."""
    return min(legal, key=lambda candidate: (abs(candidate - value), candidate))


def word(wrong: str, words: Iterable[str], cutoff: float = 0.0) -> str | None:
    """The one of `words` most like `wrong`, or None where none is at least `cutoff` alike (0 to 1)."""

    def likeness(candidate: str) -> float:
        return SequenceMatcher(None, wrong[:99].lower(), candidate.lower()).ratio()

    best = max(words, key=likeness, default=None)
    return best if best is not None and likeness(best) >= cutoff else None
