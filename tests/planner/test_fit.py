"""Least squares against numpy, and non-negative rates."""

import itertools

import numpy as np
import pytest

from megatron_hybrid.planner.fit import fit_near_one, fit_nonnegative, solve


def test_solve_is_numpys():
    generator = np.random.default_rng(0)
    matrix, right = generator.normal(size=(5, 5)), generator.normal(size=5)
    assert solve(matrix.tolist(), right.tolist()) == pytest.approx(np.linalg.solve(matrix, right).tolist())


def test_a_singular_system_leaves_its_free_unknown_at_zero():
    assert solve([[1, 1], [1, 1]], [2, 2]) == [2, 0]


def test_exact_times_are_explained_exactly():
    flops, size = [1e12, 2e12, 5e12, 1e13], [3e8, 1e9, 2e9, 1e9]
    times = [2e-5 + f / 7e14 + b / 3e12 for f, b in zip(flops, size)]
    latency, per_flop, per_byte = fit_nonnegative([[1.0] * 4, flops, size], times)
    assert (latency, 1 / per_flop, 1 / per_byte) == pytest.approx((2e-5, 7e14, 3e12), rel=1e-6)


def test_a_term_that_the_points_do_not_determine_is_left_out():
    """Linears with the same tokens and the same width: bytes are a sum of the others. FP8 once had 1,978 TFLOP/s instead of 1,184."""
    sides = [512, 1024, 2752, 3840, 5504, 11008]
    flops, size = [2 * 8192 * 3840 * n for n in sides], [2 * (8192 * 3840 + (8192 + 3840) * n) for n in sides]
    for seed in range(50):
        errors = 1 + 0.03 * np.random.default_rng(seed).normal(size=len(sides))
        times = [float(e) * (8e-5 + f / 1.2e15) for e, f in zip(errors, flops)]
        latency, per_flop, per_byte = fit_nonnegative([[1.0] * len(sides), flops, size], times)
        assert per_byte == 0 and (latency, 1 / per_flop) == pytest.approx((8e-5, 1.2e15), rel=0.2)


def test_no_rate_is_negative():
    flops = [1e12, 2e12, 4e12]
    times = [f / 7e14 - 1e-4 for f in flops]  # would need a negative latency
    latency, per_flop = fit_nonnegative([[1.0] * 3, flops], times)
    assert latency == 0 and per_flop > 0


def test_no_rate_is_above_its_limit():
    flops, size = [1e12, 2e12, 5e12, 1e13], [3e8, 1e9, 2e9, 1e9]
    times = [2e-5 + f / 2e15 + b / 3e12 for f, b in zip(flops, size)]

    def error(latency, per_byte):
        found = [latency + 1e-15 * f + per_byte * b for f, b in zip(flops, size)]
        return sum((y / time - 1) ** 2 for y, time in zip(found, times))

    latency, per_flop, per_byte = fit_nonnegative([[1.0] * 4, flops, size], times, least=(0.0, 1e-15, 0.0))
    assert per_flop == 1e-15 and latency >= 0 and per_byte >= 0
    nearby = itertools.product((latency, latency * 1.01 + 1e-7, latency * 0.99), (per_byte * 0.99, per_byte * 1.01))
    assert all(error(latency, per_byte) <= error(*other) for other in nearby)


def test_factors_stay_at_one_where_nothing_is_said():
    times = [1.2, 2.4]
    compute, host = fit_near_one([[1.0, 2.0], [0.0, 0.0]], times, times, strength=1e-6)
    assert (compute, host) == pytest.approx((1.2, 1.0), rel=1e-4)
    assert fit_near_one([[1.0]], [9.0], [9.0], strength=1e-6) == [2.0], "no factor beyond two"


def test_a_term_that_only_others_made_negative_counts():
    """Dropping the most negative term, then the next, ends at zero here: numpy's best non-negative fit has the second term."""
    columns, times = [[1.0, 1.0, 1.0], [3.0, 1.0, 2.0], [9.0, 1.0, 5.0]], [2.9, 1.1, 1.8]
    scaled = np.array(columns).T / np.array(times)[:, None]
    subsets = [s for n in range(4) for s in itertools.combinations(range(3), n)]
    errors = {}
    for subset in subsets:
        found = np.linalg.lstsq(scaled[:, list(subset)], np.ones(3), rcond=None)[0]
        if (found >= 0).all():
            errors[subset] = float(((scaled[:, list(subset)] @ found - 1) ** 2).sum())
    found = fit_nonnegative(columns, times)
    assert min(found) >= 0
    assert float(((scaled @ np.array(found) - 1) ** 2).sum()) == pytest.approx(min(errors.values()), rel=1e-9)
