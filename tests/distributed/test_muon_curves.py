"""Training with Muon: one curve under every layout, resumed under the same layout or another; and steps that are skipped."""

import math
from pathlib import Path

import pytest
import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.index_file import read_index
from testing import jobs
from testing.layouts import (
    LAYOUTS,
    LR,
    MODEL,
    SAVED,
    SHALLOW,
    STEPS,
    TOLERANCE,
    TRAIN,
    assert_same,
    few_micro_batches,
    layout,
    relative_difference,
    smallest_pattern,
)
from testing.models import SMALLEST
from testing.muon import MUON, NOT_HERE, REASON, is_matrix
from tests.distributed.test_same_curve import slow_unless

if NOT_HERE:
    pytest.skip(REASON, allow_module_level=True)

QUICK = ("DP2, overlapped in many buckets", "TP4, padded heads", "TP2, DP2", "PP2, VPP2", "CP2, TP2")
MORE = ("DP2, plain optimizer", "PP2", "TP2, PP2", "PP2, VPP2, DP2, overlapped", "CP2, DP2", "DP4")
OVERLAPPED = layout(overlap_grad_reduce=True, overlap_param_gather=True)


def run(ranks, count: int, pattern: str, parallel: dict, optimizer: dict | None = None, **more) -> list[dict]:
    train = few_micro_batches(count, parallel) | {"optimizer": MUON | (optimizer or {})}
    common = dict(model=MODEL | {"layer_pattern": pattern}, parallel=parallel, train=train, steps=STEPS, lr=LR)
    return ranks.run(jobs.curve, count, **common | more)


@pytest.fixture(scope="module")
def one_rank(ranks):
    """The curve of one rank, by layer pattern, which a hundredth of the learning rate changes."""
    curves = {}
    for pattern in ("GA", SHALLOW):
        (curves[pattern],) = run(ranks, 1, pattern, layout())
    losses = curves["GA"]["losses"]
    assert min(losses) < losses[0] - 0.05, "it learns something"
    (other,) = run(ranks, 1, "GA", layout(), {"muon_extra_scale_factor": 0.202})
    assert relative_difference(other["norms"], curves["GA"]["norms"]) > 3 * TOLERANCE
    return curves


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_unless(name in QUICK)) for name in QUICK + MORE])
def test_layout(name, ranks, one_rank):
    count, parallel = LAYOUTS[name]
    pattern = smallest_pattern(parallel)
    for result in run(ranks, count, pattern, parallel):
        assert_same(result, one_rank[pattern])
        assert result["updates"] == STEPS


@pytest.mark.parametrize("mode", ["distributed"])
def test_shared_iteration(mode, ranks, one_rank):
    for result in run(ranks, 4, "GA", layout(4), {"muon_tp_mode": mode}):
        assert_same(result, one_rank["GA"])


@pytest.mark.parametrize(
    ("source", "to"), [("TP2, PP2", "TP4, padded heads"), ("TP4, padded heads", "DP2"), ("DP2", "CP2, TP2")]
)
def test_another_layout_continues_the_curve(source, to, ranks, one_rank, tmp_path):
    count, parallel = LAYOUTS[source]
    saved = run(ranks, count, "GA", parallel, steps=SAVED, save=str(tmp_path))[0]["path"]
    count, parallel = LAYOUTS[to]
    expected = {what: one_rank["GA"][what][SAVED:] for what in ("losses", "norms")}
    for result in run(ranks, count, "GA", parallel, start=SAVED, load=saved):
        assert_same(result, expected)


def test_checkpoints_hold_the_states_of_each_kind(ranks, tmp_path):
    path = run(ranks, 2, "GA", layout(), steps=1, save=str(tmp_path))[0]["path"]
    stored = read_index(Path(path)).tensors
    for name, spec in model_tensors(ModelConfig(**MODEL | {"layer_pattern": "GA"})).items():
        matrix = is_matrix(name, torch.empty(spec.shape, device="meta"))
        states = {entry.partition("/")[0] for entry in stored if entry.endswith(f"/{name}")}
        adamw = {"optimizer.exp_avg", "optimizer.exp_avg_sq"}
        assert states == ({"optimizer.momentum_buffer"} if matrix else adamw), name


@pytest.mark.parametrize(
    ("count", "parallel", "dtype"),
    [(2, OVERLAPPED, "bf16"), (4, layout(2), "fp32"), (2, layout(2, distributed_optimizer=False), "bf16")],
    ids=["DP2, overlapped, bf16", "TP2, DP2", "TP2, plain optimizer, bf16"],
)
def test_same_layout_is_bit_identical(count, parallel, dtype, ranks, tmp_path):
    train = TRAIN | {"dtype": dtype, "optimizer": MUON | {"muon_fp32_matmul_prec": "medium"}}
    common = dict(model=MODEL | {"layer_pattern": "GA"}, parallel=parallel, train=train)
    straight = ranks.run(jobs.curve, count, steps=4, **common)
    first = ranks.run(jobs.curve, count, steps=2, save=str(tmp_path), **common)
    second = ranks.run(jobs.curve, count, start=2, steps=4, load=first[0]["path"], **common)
    for one, a, b in zip(straight, first, second, strict=True):
        assert a["losses"] + b["losses"] == one["losses"]
        assert one["updates"] == b["updates"] == 4
        for parameter, value in one["parameters"].items():
            assert torch.equal(value, b["parameters"][parameter]), parameter


@pytest.mark.parametrize("parallel", [layout(), layout(2)], ids=["DP2", "TP2"])
def test_a_skipped_step_changes_nothing(parallel, ranks):
    train = dict(steps=3, global_batch_size=4, dtype="fp32", optimizer=MUON)
    common = dict(model=SMALLEST, parallel=parallel, train=train, value=math.nan, bad_rank=0)
    for result in ranks.run(jobs.step_with_bad_gradient, 2, **common):
        before, bad, after = result["states"]
        assert [reason is None for reason in result["reasons"]] == [True, False, True]
        assert any("momentum_buffer" in name for name in before["moments"])
        for what in ("parameters", "moments"):
            assert all(torch.equal(before[what][name], bad[what][name]) for name in before[what])
            assert any(not torch.equal(bad[what][name], after[what][name]) for name in after[what])
            assert all(bool(value.isfinite().all()) for value in after[what].values())
