"""Blocks of AI2's small hybrid suite have one curve: every norm and the embedding's scale and norm, under every kind of layout. All
against one rank, fp32.

benchmarks/layout_parity.py --model small runs all layouts.
"""

import pytest

from testing import jobs
from testing.layouts import (
    PERI_NORM,
    PERI_NORM_LR,
    PERI_NORM_STEPS,
    SHALLOW,
    TOLERANCE,
    assert_same,
    few_micro_batches,
    layout,
    relative_difference,
)
from testing.zero import run as run_zero

RUN = dict(steps=PERI_NORM_STEPS, lr=PERI_NORM_LR)
CASES = {
    "TP4, padded heads": (4, "GA", layout(4), {}),
    "TP2, no sequence parallelism": (2, "GA", layout(2, sequence_parallel=False), {}),
    "TP2, tied embeddings": (2, "GA", layout(2), dict(tie_embeddings=True)),
    "PP2, VPP2, CP2": (4, SHALLOW, layout(pp=2, vpp=2, cp=2), {}),
    "TP2, PP2, tied embeddings, selective recompute": (
        4,
        "GA",
        layout(2, 2, recompute_granularity="selective"),
        dict(tie_embeddings=True),
    ),
    "CP2, full recompute": (2, "GA", layout(cp=2, recompute_granularity="full"), {}),
    "TP2, PP2, DP2": (8, "GA", layout(2, 2), {}),
    "CP4, TP2": (8, "GA", layout(2, cp=4), {}),
    "TP2, scale without a norm": (2, "GA", layout(2), dict(embedding_norm=False)),
}


@pytest.fixture(scope="module")
def one_rank(ranks):
    """Curve of a model on one rank, computed once."""
    known: dict[str, dict] = {}

    def curve(model: dict) -> dict:
        if str(model) not in known:
            train = few_micro_batches(1, layout())
            (known[str(model)],) = ranks.run(jobs.curve, 1, model=model, parallel=layout(), train=train, **RUN)
        return known[str(model)]

    return curve


@pytest.mark.parametrize("name", CASES)
def test_layout(name, ranks, one_rank):
    count, pattern, parallel, more = CASES[name]
    model, train = PERI_NORM | {"layer_pattern": pattern} | more, few_micro_batches(count, parallel)
    for result in ranks.run(jobs.curve, count, model=model, parallel=parallel, train=train, **RUN):
        assert_same(result, one_rank(model))


def test_zero_with_sequence_parallelism(ranks, one_rank):
    pytest.importorskip("deepspeed")
    model = PERI_NORM | {"layer_pattern": "GA"}
    for result in run_zero(ranks, 4, {"stage": 3}, layout(2), model=model, **RUN):
        assert_same(result, one_rank(model))


def test_curves_would_tell_a_wrong_update_or_embedding(ranks, one_rank):
    model = PERI_NORM | {"layer_pattern": "GA"}
    one, train = one_rank(model), few_micro_batches(1, layout())
    (other,) = ranks.run(
        jobs.curve, 1, model=model, parallel=layout(), train=train, **RUN | {"lr": 1.01 * PERI_NORM_LR}
    )
    assert relative_difference(other["norms"], one["norms"]) > 3 * TOLERANCE
    for change in (dict(embedding_norm=False), dict(embedding_norm=False, embed_scale=1.0)):
        assert relative_difference(one_rank(model | change)["losses"], one["losses"]) > 3 * TOLERANCE
