"""The instance filter finds what a loop over tokens finds, and what OLMo-core finds where it is installed."""

import numpy as np
import pytest

from megatron_hybrid.data.repetitions import has_repetition


def random_case(seed: int) -> tuple[np.ndarray, int, int, int]:
    """Tokens of a tiny vocabulary, with the limits of a filter: (tokens, min_period, max_period, max_count)."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, int(random.integers(2, 4)), int(random.integers(3, 120)))
    least = int(random.integers(1, 5))
    return tokens, least, int(random.integers(least, 7)), int(random.integers(3, 8))


def most_repetitions(tokens: list[int], period: int) -> int:
    """Most occurrences in a row of an n-gram of `period` tokens."""
    best = run = 0
    for token, before in zip(tokens[period:], tokens, strict=False):
        run = run + 1 if token == before else 0
        best = max(best, run)
    return (best + period) // period


def test_equal_to_a_loop():
    found = 0
    for seed in range(2000):
        tokens, least, most, count = random_case(seed)
        expected = any(most_repetitions(tokens.tolist(), period) >= count for period in range(least, most + 1))
        assert has_repetition(tokens, least, most, count) == expected, seed
        found += expected
    assert 200 < found < 1800


def test_equal_to_olmo_core():
    utils = pytest.importorskip("olmo_core.data.utils", reason="ai2-olmo-core is not installed")
    for seed in range(2000):
        tokens, least, most, count = random_case(seed)
        theirs = utils.find_periodic_sequences(tokens, max_period=most, min_period=least)
        assert has_repetition(tokens, least, most, count) == any(x.times >= count for x in theirs), seed


@pytest.mark.parametrize("period", [1, 2, 7, 13, 14])
@pytest.mark.parametrize("place", [0, 3000, None])
def test_olmo_cores_defaults(period, place):
    tokens = np.random.default_rng(0).permutation(20_000)[:8192]
    phrase = np.arange(period) + 30_000
    for count, expected in ((31, False), (32, period <= 13)):
        start = len(tokens) - count * period if place is None else place
        repeated = tokens.copy()
        repeated[start : start + count * period] = np.tile(phrase, count)
        assert has_repetition(repeated) == expected


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33])
def test_short_samples(length):
    assert has_repetition(np.zeros(length, np.int64)) == (length >= 32)
