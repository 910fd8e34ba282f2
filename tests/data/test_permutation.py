"""The order is a bijection, differs by key, and has no visible pattern."""

import numpy as np
import pytest

from megatron_hybrid.data.permutation import Permutation, hash_integers, mix64


def test_mix64_is_splitmix64():
    # The first outputs for seed 1234567: https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    state, gamma, outputs = 1234567, 0x9E3779B97F4A7C15, []
    for i in range(5):
        outputs.append(mix64(state + i * gamma))
    assert outputs == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 257, 1000, 4096, 4097, 20_000])
@pytest.mark.parametrize("key", [(0,), (1, 2)])
def test_bijection(n, key):
    permutation = Permutation(n, *key)
    assert sorted(map(permutation, range(n))) == list(range(n))


def test_random_access_at_any_size():
    n = 10**15 + 37
    permutation = Permutation(n, 7)
    images = [permutation(i) for i in [0, 1, n // 2, n - 2, n - 1]]
    assert len(set(images)) == 5 and all(0 <= image < n for image in images)
    assert images == [Permutation(n, 7)(i) for i in [0, 1, n // 2, n - 2, n - 1]]


def test_it_stays_what_it_is():
    """A run resumed by another version must read on in the same order."""
    assert [Permutation(1000, 1234, 0)(i) for i in range(6)] == [904, 215, 179, 788, 621, 326]


def test_keys_give_different_orders():
    orders = {
        tuple(Permutation(100, *key)(i) for i in range(100)) for key in [(0, 0), (0, 1), (1, 0), (1, 1), (2**63, 0)]
    }
    assert len(orders) == 5
    assert hash_integers(1, 2) != hash_integers(2, 1) and hash_integers(-1) == hash_integers(2**64 - 1)


def test_places_are_uniform_over_keys():
    """Over many keys each thing lands everywhere equally often: chi-square, 49 degrees of freedom, 10 sigma wide."""
    n, keys = 50, 2000
    for i in (0, 1, 49):
        counts = np.bincount([Permutation(n, key)(i) for key in range(keys)], minlength=n)
        chi2 = float(((counts - keys / n) ** 2).sum() / (keys / n))
        assert abs(chi2 - (n - 1)) < 10 * np.sqrt(2 * (n - 1))


def test_neighbours_are_not_correlated():
    n = 5000
    order = np.array([Permutation(n, 3)(i) for i in range(n)])
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("i", [-1, 10])
def test_outside(i):
    with pytest.raises(IndexError):
        Permutation(10, 0)(i)


def test_of_nothing():
    with pytest.raises(ValueError, match="n must be at least 1"):
        Permutation(0)
