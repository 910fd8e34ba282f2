"""Qwen3.5's blocks have one curve: tensor parallelism beyond the heads, a pipeline of slices. All against one rank, fp32.

benchmarks/layout_parity.py --model qwen runs all layouts.
"""

import pytest

from testing import jobs
from testing.layouts import LR, QWEN, SHALLOW, assert_same, few_micro_batches, layout

STEPS = 4


@pytest.mark.parametrize(
    ("count", "pattern", "parallel"),
    [
        (4, "GA", layout(4)),
        (2, "GA", layout(2, sequence_parallel=False)),
        (4, SHALLOW, layout(pp=2, vpp=2, cp=2)),
        (8, "GA", layout(2, 2)),
        (8, "GA", layout(2, cp=4)),
    ],
    ids=["TP4", "TP2, no sequence parallelism", "PP2, VPP2, CP2", "TP2, PP2, DP2", "CP4, TP2"],
)
def test_layout(count, pattern, parallel, ranks):
    model = QWEN | {"layer_pattern": pattern}
    (one,), several = (
        ranks.run(jobs.curve, n, model=model, parallel=p, train=few_micro_batches(n, p), steps=STEPS, lr=LR)
        for n, p in ((1, layout()), (count, parallel))
    )
    assert one["losses"][-1] < one["losses"][0]
    for result in several:
        assert_same(result, one)
