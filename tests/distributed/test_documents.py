"""Quantities derived from document starts equal those of a loop over tokens, for whole rows and for every slice."""

import numpy as np
import pytest
import torch

from megatron_hybrid.distributed import documents


def random_starts(random: np.random.Generator, rows: int, length: int) -> torch.Tensor:
    """Starts of random documents, many of one token: int32 [rows, length]."""
    firsts = random.random((rows, length)) < random.choice([0.0, 0.1, 0.5, 0.9, 1.0], (rows, 1))
    places = np.where(firsts, np.arange(length), 0)
    return torch.from_numpy(np.maximum.accumulate(places, axis=1).astype(np.int32))


def oracle(starts: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """Boundaries and positions, token by token."""
    bounds, positions = [], []
    for row in starts:
        positions.append([])
        for i, start in enumerate(row):
            if start == i:
                bounds.append(sum(map(len, positions)))
            positions[-1].append(i - start)
    return bounds, positions


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_derived_quantities(seed, size):
    random = np.random.default_rng(seed)
    rows, length = int(random.integers(1, 4)), 4 * int(random.integers(1, 7))
    starts, capacity = random_starts(random, rows, length), rows * length
    bounds, positions = oracle(starts.tolist())
    cu_seqlens = documents.cu_seqlens(starts, capacity)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.shape == (capacity + 1,)
    assert cu_seqlens.tolist() == bounds + [capacity] * (capacity + 1 - len(bounds))
    parts = [documents.positions(*documents.slice_starts(starts, rank, size)) for rank in range(size)]
    assert torch.cat(parts, 1).tolist() == positions


def test_the_tightest_capacity_fits_and_one_less_fails():
    starts = torch.tensor([[0, 1, 1, 3], [0, 0, 2, 2]], dtype=torch.int32)
    assert documents.cu_seqlens(starts, 5).tolist() == [0, 1, 3, 4, 6, 8]
    with pytest.raises(RuntimeError, match="more than 4 documents"):
        documents.cu_seqlens(starts, 4)


def test_nothing_depends_on_values_on_the_host():
    """Tensors without values raise wherever a shape or a branch would need one."""
    starts = torch.zeros(2, 8, dtype=torch.int32, device="meta")
    part, offset = documents.slice_starts(starts, 1, 2)
    assert documents.cu_seqlens(starts, 16).shape == (17,) and documents.positions(part, offset).shape == (2, 4)
    with pytest.raises(RuntimeError):
        starts[starts == 0].tolist()


def test_slices_must_divide():
    with pytest.raises(ValueError, match="6 tokens do not divide into 4"):
        documents.slice_starts(torch.zeros(1, 6, dtype=torch.int32), 0, 4)
