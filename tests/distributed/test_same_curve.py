"""One model, one curve: loss and gradient norm of every step are the same under every layout, and after saving under one
layout and resuming under another. All against one rank, fp32.
"""

import pytest

from testing import jobs
from testing.layouts import (
    DEEP,
    LAYOUTS,
    LR,
    MODEL,
    SHALLOW,
    STEPS,
    TOLERANCE,
    assert_same,
    few_micro_batches,
    layout,
    relative_difference,
    run,
    smallest_pattern,
)

QUICK = (
    "one rank, selective recompute",
    "DP2",
    "TP2",
    "PP2, VPP2",
    "TP2, PP2",
    "TP4, padded heads",
    "CP2, full recompute",
    "CP2, TP2",
    "TP2, PP2, DP2",
)


def slow_unless(quick: bool) -> list:
    return [] if quick else [pytest.mark.slow]


@pytest.fixture(scope="module")
def one_rank(ranks):
    """The curve of one rank, by layer pattern: what every layout is compared with."""
    curves = {}
    for pattern in ("GA", SHALLOW, DEEP):
        (curves[pattern],) = run(ranks, 1, pattern, layout())
        losses = curves[pattern]["losses"]
        assert min(losses) < losses[0] - 0.01, "it learns something"
        (other,) = run(ranks, 1, pattern, layout(), lr=1.01 * LR)
        seen = {what: relative_difference(other[what], curves[pattern][what]) for what in ("losses", "norms")}
        assert max(seen.values()) > 3 * TOLERANCE, f"updates that are wrong by a hundredth would not be seen: {seen}"
    return curves


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_unless(name in QUICK)) for name in LAYOUTS])
def test_layout(name, ranks, one_rank):
    count, parallel = LAYOUTS[name]
    pattern = smallest_pattern(parallel)
    for result in run(ranks, count, pattern, parallel):
        assert_same(result, one_rank[pattern])


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", ["WA", pytest.param("G*2", marks=pytest.mark.slow)])
def test_one_kind_of_mixer_in_slices(pattern, count, ranks):
    """A window that looks back over the edges of slices; and states alone."""
    only = dict(sliding_window=11) if "W" in pattern else {}
    model = MODEL | {"layer_pattern": pattern} | only
    (one,), several = (
        ranks.run(jobs.curve, n, model=model, parallel=cp, train=few_micro_batches(n, cp), steps=STEPS, lr=LR)
        for n, cp in ((n, layout(cp=n)) for n in (1, count))
    )
    for result in several:
        assert_same(result, one)
