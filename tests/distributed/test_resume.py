"""Stopping and going on: bit for bit under the same layout, the same curve under another."""

from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_hybrid.checkpoint.reader import CheckpointReader
from testing import jobs
from testing.layouts import MODEL, SAVED, TRAIN, assert_same, layout, run, smallest_pattern
from testing.parallel import OVERLAP
from tests.distributed.test_same_curve import one_rank as one_rank  # noqa: F401 - a fixture
from tests.distributed.test_same_curve import slow_unless

TWO_LAYERS = MODEL | {"layer_pattern": "GA"}
SAME = {
    "one rank": (1, layout(), {}),
    "one rank, bf16": (1, layout(), {"dtype": "bf16"}),
    "DP2, plain optimizer, bf16": (2, layout(distributed_optimizer=False), {"dtype": "bf16"}),
    "DP2, overlapped, bf16": (2, layout(**OVERLAP), {"dtype": "bf16"}),
    "TP2, PP2": (4, layout(2, 2), {}),
    "CP2, bf16": (2, layout(cp=2), {"dtype": "bf16"}),
    "CP2, TP2": (4, layout(2, cp=2), {}),
    "DP4, bf16, written in the background": (4, layout(), {"dtype": "bf16", "async_save": True}),
    "TP2, PP2, DP2, overlapped, bf16": (
        8,
        layout(2, 2, **OVERLAP),
        {"dtype": "bf16"},
    ),
}


QUICK = (
    "one rank, bf16",
    "DP2, overlapped, bf16",
    "TP2, PP2",
    "CP2, bf16",
    ("TP2, PP2", "one rank"),
    ("CP2, TP2", "CP4"),
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_unless(name in QUICK)) for name in SAME])
def test_same_layout_is_bit_identical(name, ranks, tmp_path):
    count, parallel, more = SAME[name]
    train = TRAIN | {"dtype": more.get("dtype", "fp32")}
    common = dict(model=TWO_LAYERS, parallel=parallel, train=train)
    straight = ranks.run(jobs.curve, count, steps=4, **common)
    first = ranks.run(
        jobs.curve, count, steps=2, save=str(tmp_path), async_save=more.get("async_save", False), **common
    )
    second = ranks.run(jobs.curve, count, start=2, steps=4, load=first[0]["path"], **common)
    for one, a, b in zip(straight, first, second, strict=True):
        assert a["losses"] + b["losses"] == one["losses"]
        assert a["norms"] + b["norms"] == one["norms"]
        assert one["updates"] == b["updates"] == 4
        for parameter, value in one["parameters"].items():
            assert torch.equal(value, b["parameters"][parameter]), parameter


def checkpoint(folder: str) -> dict[str, torch.Tensor]:
    with CheckpointReader(Path(folder)) as reader:
        return {name: reader.read(name) for name in reader.index.tensors}


@pytest.mark.parametrize(
    ("count", "parallel"),
    [
        (2, layout(**OVERLAP)),
        pytest.param(4, layout(2), marks=pytest.mark.slow),
    ],
    ids=["DP2, overlapped", "TP2, DP2"],
)
def test_weights_that_come_from_their_masters(count, parallel, ranks, tmp_path):
    common = dict(model=TWO_LAYERS, parallel=parallel, train=TRAIN | {"dtype": "bf16"})
    straight = ranks.run(jobs.curve, count, steps=4, **common)
    plain = ranks.run(jobs.curve, count, steps=2, save=str(tmp_path / "plain"), **common)
    first = ranks.run(jobs.curve_from_masters, count, steps=2, save=str(tmp_path / "masters"), **common)
    one, other = checkpoint(plain[0]["path"]), checkpoint(first[0]["path"])
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    second = ranks.run(jobs.curve_from_masters, count, start=2, steps=4, load=plain[0]["path"], **common)
    for whole, a, b in zip(straight, first, second, strict=True):
        assert a["losses"] + b["losses"] == whole["losses"]
        for parameter, value in whole["parameters"].items():
            assert torch.equal(value, b["parameters"][parameter]), parameter


FROM = {
    "TP2, PP2": (4, layout(2, 2)),
    "TP4, padded": (4, layout(4)),
    "DP2, plain": (2, layout(distributed_optimizer=False)),
    "CP2, TP2": (4, layout(2, cp=2)),
    "CP2, DP2, plain": (4, layout(cp=2, distributed_optimizer=False)),
    "TP2, PP2, DP2": (8, layout(2, 2)),
}
TO = {
    "one rank": (1, layout()),
    "TP4, padded heads": (4, layout(4)),
    "PP4, VPP2": (4, layout(pp=4, vpp=2)),
    "TP2, DP2": (4, layout(2)),
    "DP4": (4, layout()),
    "CP4": (4, layout(cp=4)),
    "CP2, DP2": (4, layout(cp=2)),
    "DP2, plain optimizer": (2, layout(distributed_optimizer=False)),
    "CP2, TP2, PP2": (8, layout(2, 2, cp=2)),
}


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A checkpoint of step SAVED, given the name of the layout that is to write it and the layers."""

    @cache
    def folder(name: str, pattern: str) -> str:
        count, parallel = FROM[name]
        return run(ranks, count, pattern, parallel, steps=SAVED, save=str(tmp_path_factory.mktemp("saved")))[0]["path"]

    return folder


PAIRS = [("TP2, PP2", to) for to in TO] + [(s, t) for s in list(FROM)[1:] for t in ("one rank", "TP2, DP2")]
PAIRS += [("CP2, TP2", "CP4"), ("CP2, DP2, plain", "CP4"), ("TP2, PP2, DP2", "CP2, TP2, PP2")]


@pytest.mark.parametrize(("source", "to"), [pytest.param(*p, marks=slow_unless(p in QUICK)) for p in PAIRS])
def test_another_layout_goes_on_with_the_same_curve(source, to, ranks, saved, one_rank):  # noqa: F811
    count, parallel = TO[to]
    pattern = smallest_pattern(parallel)
    expected = {what: one_rank[pattern][what][SAVED:] for what in ("losses", "norms")}
    for result in run(ranks, count, pattern, parallel, start=SAVED, load=saved(source, pattern)):
        assert_same(result, expected)
