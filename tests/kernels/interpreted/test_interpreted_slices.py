"""Triton kernels under the interpreter on sequences in slices, one per rank, against whole sequences in fp64."""

import pytest

from hybrid_kernels.testing import delta_rule_inputs, packed_inputs, random_positions
from tests.distributed.slice_jobs import check_conv, check_delta_rule


@pytest.mark.parametrize(
    "bounds, batch, key_dim, seed, options",
    [
        ([0, 65, 100], 2, 16, None, dict(save="scores")),
        ([0, 40, 70], 1, 96, None, dict(save="inputs")),
        ([0, 30, 70], 1, 32, None, dict(save="states")),
        ([0, 100, 180], 1, 32, None, dict(segments=2)),
        ([0, 20, 40, 60, 70], 1, 16, None, dict()),
        ([0, 65, 100], 3, 16, 5, dict(save="scores")),
        ([0, 100, 180], 2, 16, 3, dict(segments=2)),
        ([0, 20, 40, 60, 70], 3, 16, 5, dict(save="inputs")),
    ],
    ids=["scores", "inputs", "states", "segments", "4 ranks", "documents", "documents, segments", "documents, 4 ranks"],
)
def test_gated_delta_rule(bounds, batch, key_dim, seed, options, ranks):
    inputs = delta_rule_inputs(batch, bounds[-1], 1, 1, key_dim, 64, gate=-1e-2)
    positions = None if seed is None else random_positions(batch, bounds[-1], seed=seed)
    check_delta_rule(ranks, inputs, bounds, 2e-5, positions, backend="triton", **options)


@pytest.mark.parametrize(
    "bounds, seed",
    [([0, 20, 37], None), ([0, 3, 10, 13, 37], 2)],
    ids=["2 ranks", "documents, 4 ranks"],
)
def test_conv_gates(bounds, seed, ranks):
    dims = dict(num_key_heads=1, num_value_heads=2, key_head_dim=16, value_head_dim=16)
    inputs = packed_inputs(37, 2, 1, 2, 16, 16)
    positions = None if seed is None else random_positions(2, 37, seed=seed)
    check_conv(ranks, inputs, bounds, 1e-5, positions, backend="triton", walk=(16, 4, 4), **dims)
