"""Triton kernels under the interpreter on sequences in slices, one per rank, against whole sequences in fp64."""

import pytest

from hybrid_kernels.testing import delta_rule_inputs, packed_inputs
from tests.distributed.slice_jobs import check_conv, check_delta_rule


@pytest.mark.parametrize(
    "bounds, batch, key_dim, options",
    [
        ([0, 65, 100], 2, 16, dict(save="scores")),
        ([0, 40, 70], 1, 96, dict(save="inputs")),
        ([0, 30, 70], 1, 32, dict(save="states")),
        ([0, 100, 180], 2, 32, dict(segments=2)),
        ([0, 20, 40, 60, 70], 1, 16, dict()),
    ],
    ids=["scores", "inputs", "states", "segments", "4 ranks"],
)
def test_gated_delta_rule(bounds, batch, key_dim, options, ranks):
    inputs = delta_rule_inputs(batch, bounds[-1], 1, 1, key_dim, 64, gate=-1e-2)
    check_delta_rule(ranks, inputs, bounds, 2e-5, backend="triton", **options)


@pytest.mark.parametrize("bounds", [[0, 20, 37], [0, 3, 10, 13, 37]], ids=["2 ranks", "4 ranks"])
def test_conv_gates(bounds, ranks):
    dims = dict(num_key_heads=1, num_value_heads=2, key_head_dim=16, value_head_dim=16)
    inputs = packed_inputs(37, 2, 1, 2, 16, 16)
    check_conv(ranks, inputs, bounds, 1e-5, backend="triton", walk=(16, 4, 4), **dims)
