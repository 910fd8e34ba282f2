"""Attended length against sequences that are cut and packed one by one."""

import random

import pytest

from megatron_hybrid.arch.documents import assumed_attended_length, attended_length

SEQUENCE = 100


def lengths(mean: float, count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [max(1, round(rng.lognormvariate(0, 1.27) * mean / 2.24)) for _ in range(count)]


def squares_of_stream(documents: list[int]) -> float:
    """Sum of squares of the parts of documents in a stream that is cut every SEQUENCE tokens, token by token."""
    squares = part = position = 0
    for length in documents:
        for _ in range(length):
            part, position = part + 1, position + 1
            if position % SEQUENCE == 0:
                squares, part = squares + part**2, 0
        squares, part = squares + part**2, 0
    return squares


def squares_of_pieces(documents: list[int]) -> float:
    squares = 0
    for length in documents:
        while length > 0:
            squares += min(length, SEQUENCE) ** 2
            length -= SEQUENCE
    return squares


@pytest.mark.parametrize("mean", [8, 60, 300])
def test_of_lengths(mean):
    documents = lengths(mean, 20_000)
    packed = squares_of_pieces(documents) / sum(documents)
    assert attended_length(documents, SEQUENCE, packed=True) == pytest.approx(packed)
    cut = squares_of_stream(documents) / sum(documents)
    assert attended_length(documents, SEQUENCE, packed=False) == pytest.approx(cut, rel=0.01)
    assert cut < packed


@pytest.mark.parametrize("mean", [20, 60, 300])
@pytest.mark.parametrize("packed", [True, False])
def test_of_assumed_lengths(mean, packed):
    documents = lengths(mean, 200_000)
    expected = attended_length(documents, SEQUENCE, packed)
    assert assumed_attended_length(sum(documents) / len(documents), SEQUENCE, packed).tokens == pytest.approx(
        expected, rel=0.05
    )


def test_limits():
    assert assumed_attended_length(1e9, SEQUENCE, packed=True).tokens == SEQUENCE
    assert assumed_attended_length(1e9, SEQUENCE, packed=False).tokens == SEQUENCE
    assert assumed_attended_length(1, SEQUENCE, packed=True).tokens < 8
