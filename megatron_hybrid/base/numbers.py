"""Number types for argparse, whose errors name the wrong number and the remedy."""

import argparse
import math


def whole_number(text: str, least: int, most: int | None = None) -> int:
    """Parse a whole number from `least` to `most`. Raises ArgumentTypeError otherwise."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if value < least else f"at most {most}"
        raise argparse.ArgumentTypeError(f"{text} is out of range; give {limit}")
    return value


def positive(text: str) -> int:
    """Parse a number of at least 1."""
    return whole_number(text, 1, (1 << 63) - 1)


def non_negative(text: str) -> int:
    """Parse a number of at least 0."""
    return whole_number(text, 0, (1 << 63) - 1)


def non_negative_real(text: str) -> float:
    """Parse a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is out of range; give a finite number of at least 0")
    return value
