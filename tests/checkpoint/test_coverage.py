"""Coverage of a tensor by slices, compared with counting how often each element is stored."""

import random

import numpy as np
import pytest

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.checkpoint.coverage import coverage_problem


def cut(rng: random.Random, part: TensorSlice, depth: int) -> list[TensorSlice]:
    """Return a slice cut at random places, several times."""
    dims = [dim for dim, length in enumerate(part.shape) if length > 1]
    if depth == 0 or not dims:
        return [part]
    dim = rng.choice(dims)
    at = rng.randint(1, part.shape[dim] - 1)
    first, second = list(part.shape), list(part.shape)
    first[dim], second[dim] = at, part.shape[dim] - at
    moved = list(part.offset)
    moved[dim] += at
    halves = (TensorSlice(part.offset, tuple(first)), TensorSlice(tuple(moved), tuple(second)))
    return [piece for half in halves for piece in cut(rng, half, depth - 1)]


def move(rng: random.Random, shape: tuple[int, ...], part: TensorSlice) -> TensorSlice:
    """Return a slice of the same extent somewhere in the tensor."""
    return TensorSlice(tuple(rng.randint(0, n - k) for n, k in zip(shape, part.shape, strict=True)), part.shape)


@pytest.mark.parametrize("seed", range(200))
def test_overlaps_and_gaps_are_found(seed):
    rng = random.Random(seed)
    shape = rng.choice([(17,), (9, 12), (1, 30), (12, 7)])
    parts = cut(rng, TensorSlice.whole(shape), 4)
    for _ in range(seed % 3):
        index = rng.randrange(len(parts))
        parts[index] = move(rng, shape, parts[index])
    if seed % 5 == 0:
        parts.pop()
    rng.shuffle(parts)
    stored = np.zeros(shape, int)
    for part in parts:
        stored[part.index] += 1
    assert (coverage_problem(shape, parts) is None) == bool((stored == 1).all())


def test_tensors_of_other_dimensions():
    assert coverage_problem((), [TensorSlice((), ())]) is None
    whole = TensorSlice((0, 0, 0), (4, 3, 2))
    assert coverage_problem((4, 3, 2), [whole]) is None
    halves = [TensorSlice((0, 0, 0), (4, 1, 2)), TensorSlice((0, 1, 0), (4, 2, 2))]
    assert coverage_problem((4, 3, 2), halves) is None
    twice = [TensorSlice((0, 0, 0), (2, 3, 2)), TensorSlice((1, 0, 0), (2, 3, 2))]
    assert coverage_problem((4, 3, 2), twice) == "has two slices that overlap, at row 1, column 0"
