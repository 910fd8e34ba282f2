"""Stages that are killed end with the same weights and moments when the same command runs again."""

import pytest

from testing.killed_stages import STAGES, values_that_differ


@pytest.mark.slow
def test_it_ends_with_the_same_values(root, tmp_path):
    """One kill and two stages. benchmarks/killed_stages.py has more kills, and an average of stages."""
    stages = [STAGES[0], STAGES[-1] | {"from": "first"}]
    assert values_that_differ(root, tmp_path, kills=1, seed=1, stages=stages) == 0
    assert (tmp_path / "killed" / "loss.png").stat().st_size > 10_000
