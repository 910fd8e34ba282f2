"""Collectives that average gradients give the same bits as a division before a sum, for the numbers of ranks that do it."""

import pytest
import torch

from megatron_hybrid.config.parallel import averages_exactly
from testing.layouts import LAYOUTS, MODEL, SHALLOW, TRAIN
from tests.distributed import average_jobs


def test_powers_of_two_average():
    assert [ranks for ranks in range(1, 33) if averages_exactly(ranks)] == [2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    "name", ["DP2", "DP2, plain optimizer", "DP2, overlapped in many buckets", "CP2, DP2, overlapped"]
)
def test_the_curve_has_the_same_bits(name, ranks):
    count, parallel = LAYOUTS[name]
    arguments = dict(model=MODEL | {"layer_pattern": SHALLOW}, parallel=parallel, train=TRAIN, steps=3)
    runs = [ranks.run(average_jobs.curve, count, averages=averages, **arguments) for averages in (True, False)]
    for averaged, summed in zip(*runs, strict=True):
        assert averaged["losses"] == summed["losses"] and averaged["norms"] == summed["norms"]
        assert averaged["parameters"].keys() == summed["parameters"].keys()
        for parameter, value in averaged["parameters"].items():
            assert torch.equal(value, summed["parameters"][parameter]), parameter
