"""The loss is the mean over the counted tokens of the global batch: against one process that computes it in fp64."""

import math
from importlib.util import find_spec

import pytest
import torch

from testing import jobs
from testing.layouts import MODEL, SHALLOW, layout
from tests.train import loss_jobs
from tests.train.test_trainer import config, metrics  # noqa: F401 - config is a fixture

TRAIN = dict(steps=1, global_batch_size=8, micro_batch_size=2, dtype="fp32", z_loss=1e-2, eval_accuracy=True)
SMALL = MODEL | {"layer_pattern": SHALLOW}
LAYOUTS = {
    # name: (ranks, layout, DeepSpeed's zero section)
    "one rank, full recompute": (1, layout(recompute_granularity="full"), None),
    "DP2, overlapped": (2, layout(overlap_grad_reduce=True), None),
    "TP2, DP2, plain optimizer": (4, layout(2, distributed_optimizer=False), None),
    "PP2, VPP2, DP2": (4, layout(pp=2, vpp=2), None),
    "CP2, TP2": (4, layout(2, cp=2), None),
    "CP2, DP2": (4, layout(cp=2), None),
    "ZeRO 2, DP2": (2, layout(), {"stage": 2}),
}


def data() -> dict[str, torch.Tensor]:
    """A global batch of four micro-batches: one counts no token, one few, and weights are 0, 0.5 or 1."""
    generator = torch.Generator().manual_seed(0)
    samples = jobs.samples_of_step(0, 8, MODEL["vocab_size"])
    kept = torch.tensor([1.0, 0.9, 0.0, 0.0, 0.1, 0.02, 0.5, 1.0])[:, None]
    masks = (torch.rand(8, jobs.SEQUENCE_LENGTH, generator=generator) < kept).float()
    masks[6] *= 0.5
    return {"samples": samples, "masks": masks, "sources": torch.eye(3)[torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])]}


@pytest.fixture(scope="module")
def expected(ranks):
    return ranks.run(loss_jobs.plain_mean, 1, model=SMALL, train=TRAIN, **data())[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_mean_over_counted_tokens(name, ranks, expected):
    count, parallel, zero = LAYOUTS[name]
    if zero and find_spec("deepspeed") is None:
        pytest.skip("no DeepSpeed here")
    engine = {"engine": "deepspeed"} if zero else {}
    results = ranks.run(
        loss_jobs.masked_step, count, model=SMALL, parallel=parallel, train=TRAIN | engine, zero=zero, **data()
    )
    scale = max(g.abs().max() for g in expected["gradients"].values())
    norm = math.sqrt(sum(g.double().square().sum() for g in expected["gradients"].values()))
    seen = set()
    for result in results:
        for losses in (result["losses"], result["evaluated"]):
            assert losses.loss == pytest.approx(expected["loss"], rel=1e-6)
            assert losses.z_loss == pytest.approx(expected["z_loss"], rel=1e-6)
            assert losses.by_source[:2] == pytest.approx(expected["by_source"][:2], rel=1e-6)
            assert math.isnan(losses.by_source[2]), "no sequence comes from it"
            assert losses.weight == data()["masks"].sum() and losses.counts.slots == data()["masks"].numel()
        assert result["evaluated"].correct == expected["correct"] and result["losses"].correct is None
        assert result["norm"] == pytest.approx(norm, rel=1e-5)
        for tensor, source, gradient in result["gradients"]:
            torch.testing.assert_close(
                gradient, source.narrow(expected["gradients"][tensor]), rtol=1e-4, atol=1e-6 * float(scale)
            )
            seen.add(tensor)
    assert seen == set(expected["gradients"])


def test_a_mean_of_means_would_be_seen(expected):
    assert abs(expected["mean_of_means"] / expected["loss"] - 1) > 1e-3


def test_without_masks_no_rank_communicates_before_its_first_forward_pass(monkeypatch):
    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.train.engines.losses import GlobalBatch

    class Groups:
        class dp:  # noqa: N801
            size = staticmethod(lambda: 2)

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: pytest.fail("communicates"))
    batch = Batch.of_samples(torch.zeros(1, 5, dtype=torch.int64))
    assert GlobalBatch([batch], Groups).sums.weigh(batch) is batch


def test_a_batch_that_counts_nothing_is_skipped(ranks, config):  # noqa: F811
    config["train"] |= {"steps": 3, "batch_ramp": None, "eval_interval": None, "global_batch_size": 4}
    for result in ranks.run(loss_jobs.uncounted_step, 2, config=config):
        first, second, third = (state["parameters"] for state in result["states"])
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(second[name], third[name]) for name in first)
        assert result["updates"] == 2 and len(result["window"]["losses"]) == 2
    lines = metrics(config)
    assert lines[1]["skip_reason"] == "no token of the batch counts in the loss" and lines[1]["loss"] is None
    assert lines[0]["loss"] > 0 and lines[2]["loss"] > 0 and lines[1]["grad_norm"] == 0
