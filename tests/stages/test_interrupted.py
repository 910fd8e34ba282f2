"""Stages that are killed end with the same weights and moments when the same command runs again."""

import pytest

from testing.killed_stages import values_that_differ


@pytest.mark.slow
def test_it_ends_with_the_same_values(root, tmp_path):
    """One kill. benchmarks/killed_stages.py makes more."""
    assert values_that_differ(root, tmp_path, kills=1, seed=1) == 0
    assert (tmp_path / "killed" / "loss.png").stat().st_size > 10_000
