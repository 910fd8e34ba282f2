"""Shares are kept at every point, and samples follow from the index."""

import random
from collections import Counter

import numpy as np
import pytest

from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.dataset import FixedLengthDataset
from tests.data.files import counting_source


class Counting:
    """A dataset whose sample i is [number, i]."""

    def __init__(self, number: int, sequence_length: int = 1):
        self.number, self.sequence_length = number, sequence_length

    def sample(self, index: int) -> np.ndarray:
        return np.array([self.number, index])


def blend(*weights: float) -> Blend:
    return Blend([Counting(i) for i in range(len(weights))], weights)


generator = random.Random(0)
WEIGHTS = [
    (1.0,),
    (1.0, 1.0),
    (0.9, 0.1),
    (1e-6, 1.0),
    (1.0, 1.0, 1.0),
    (0.45, 0.45, 0.45, 1e-3),
    tuple(1.0 for _ in range(17)),
    tuple(2.0**-i for i in range(20)),
    tuple(generator.random() for _ in range(50)),
    (1e300, 1e300, 1.0),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_shares_hold_at_every_point(weights):
    mixed = blend(*weights)
    counts = np.zeros(len(weights), int)
    shares = np.array(weights) / max(weights)
    shares /= shares.sum()
    worst = 0.0
    for index in range(5000):
        dataset, i = mixed.locate(index)
        assert i == counts[dataset]  # each dataset's samples in order, none left out or twice
        counts[dataset] += 1
        worst = max(worst, float(np.abs(counts - shares * (index + 1)).max()))
        if index % 500 == 0:
            assert mixed.counts(index + 1) == counts.tolist()
    assert worst <= (0.5 if len(weights) <= 2 else 1.5) + 1e-9


def test_random_access_far_out():
    mixed = blend(0.5, 0.3, 0.2)
    start = 10**15
    before = mixed.counts(start)
    assert sum(before) == start and before == pytest.approx([start * share for share in (0.5, 0.3, 0.2)], abs=1.5)
    counts = Counter()
    for index in range(start, start + 1000):
        dataset, i = mixed.locate(index)
        assert i == before[dataset] + counts[dataset]
        counts[dataset] += 1


def test_it_stays_what_it_is():
    """A run resumed by another version must read on in the same order."""
    assert [blend(0.5, 0.3, 0.2).locate(i) for i in range(6)] == [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1)]


def test_samples_are_the_datasets(tmp_path):
    datasets = [FixedLengthDataset(counting_source(tmp_path / f"{n}.npy", n), 4, seed=n) for n in (101, 57)]
    mixed = Blend(datasets, [3, 1])
    for index in [0, 1, 2, 3, 500, 7]:
        dataset, i = mixed.locate(index)
        assert (mixed.sample(index) == datasets[dataset].sample(i)).all()


@pytest.mark.parametrize("weights", [(), (0.0,), (-1.0, 1.0), (float("inf"),), (float("nan"), 1.0)])
def test_wrong_weights(weights):
    with pytest.raises(ValueError, match="weight"):
        blend(*weights)


def test_wrong_datasets():
    with pytest.raises(ValueError, match="2 datasets and 1 weights"):
        Blend([Counting(0), Counting(1)], [1.0])
    with pytest.raises(ValueError, match="one sequence_length"):
        Blend([Counting(0), Counting(1, 2)], [1.0, 1.0])
    with pytest.raises(IndexError):
        blend(1.0).locate(-1)


def test_weights_that_change_at_given_samples():
    """Every dataset continues with its next sample, and the shares hold in every part."""
    mixed = Blend([Counting(i) for i in range(3)], (1.0, 1.0, 0.0), [(101, (0.0, 3.0, 1.0)), (301, (1.0, 0.0, 0.0))])
    counts = np.zeros(3, int)
    for index in range(500):
        dataset, i = mixed.locate(index)
        assert i == counts[dataset], index
        counts[dataset] += 1
        if index % 50 in (0, 49) or index in (99, 100, 101, 299, 300, 301):
            assert mixed.counts(index + 1) == counts.tolist()
    assert mixed.counts(101) == [51, 50, 0] or mixed.counts(101) == [50, 51, 0]
    assert np.subtract(mixed.counts(301), mixed.counts(101)).tolist() == [0, 150, 50]
    assert np.subtract(mixed.counts(500), mixed.counts(301)).tolist() == [199, 0, 0]
    assert mixed.shares == (0.5, 0.5, 0.0) and mixed.changes == [(101, (0.0, 0.75, 0.25)), (301, (1.0, 0.0, 0.0))]


def test_wrong_changes():
    with pytest.raises(ValueError, match="a change at sample 5: must be above 5"):
        Blend([Counting(0)], (1.0,), [(5, (1.0,)), (5, (2.0,))])
    with pytest.raises(ValueError, match="give as many weights"):
        Blend([Counting(0)], (1.0,), [(5, (1.0, 2.0))])


@pytest.mark.parametrize(
    "sizes, weights", [((7,), (3.0,)), ((10, 10), (1, 1)), ((5, 40, 8), (1, 3, 1)), ((1, 9), (9, 1))]
)
def test_samples_without_repeats(sizes, weights):
    mixed = blend(*weights)
    for dataset, size in zip(mixed.datasets, sizes, strict=True):
        dataset.samples_per_epoch = size
    most, repeated = mixed.samples_without_repeats(), False
    for index in range(most + 1):
        dataset, i = mixed.locate(index)
        repeated |= i >= sizes[dataset]
        assert repeated == (index == most), "and the next sample would be a repeat"
    assert len(sizes) > 1 or most == sizes[0]


def test_sources_of_samples():
    mixed = blend(3.0, 1.0, 2.0)
    found = mixed.sources(5, 40)
    assert found.argmax(1).tolist() == [mixed.locate(index)[0] for index in range(5, 45)]
    assert (found.sum(1) == 1).all() and found.dtype == np.float32 and found.shape == (40, 3)
    assert blend(1.0).sources(0, 3) is None
