"""A ramp of the sequence length: its borders, and the same losses as sequences that are split by hand, under every layout."""

import pytest
import torch

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.train import SequenceRampConfig, TrainConfig
from megatron_hybrid.data.batch import Batch
from testing import jobs
from tests.train import stage_jobs
from tests.train.test_trainer import make_config, metrics


def test_equal_shares_of_the_samples():
    train = TrainConfig(steps=9, global_batch_size=4, sequence_ramp=SequenceRampConfig(start=128, samples=300))
    borders = {0: 128, 99: 128, 100: 256, 199: 256, 200: 512, 299: 512, 300: 1024, 10**9: 1024}
    assert {c: train.sequence_length_at(c, 1024) for c in borders} == borders
    assert TrainConfig(steps=9, global_batch_size=4).sequence_length_at(0, 1024) == 1024


def test_split():
    batch = Batch.of_samples(torch.arange(18).view(2, 9)).split(4)
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [9, 10, 11, 12], [13, 14, 15, 16]]
    assert torch.equal(batch.labels, batch.tokens + 1) and batch.loss_mask.shape == (4, 4)
    assert batch.split(4) is batch
    with pytest.raises(ValueError, match="do not divide"):
        batch.split(3)


LAYOUTS = {
    "CP2": (2, dict(context_parallel_size=2)),
    "PP2": (2, dict(pipeline_parallel_size=2)),
}


def test_the_losses_are_those_of_shorter_sequences(ranks, tmp_path):
    config = make_config(tmp_path)
    config["train"] |= {"steps": 4, "batch_ramp": None, "eval_interval": None}
    (expected,) = ranks.run(stage_jobs.split_by_hand, 1, config=config, lengths=[8, 8, 16, 16])
    config["train"] |= {"sequence_ramp": {"start": 8, "samples": 16}}
    for name, (count, parallel) in LAYOUTS.items():
        run = config | {"parallel": parallel, "run_dir": str(tmp_path / name), "checkpoint": {"interval": None}}
        ranks.run(jobs.pretrain_run, count, config=run)
        lines = metrics(run)
        assert [line["loss"] for line in lines] == pytest.approx(expected, rel=1e-4), name
        assert lines[-1]["tokens"] == 4 * 8 * 16


BASE = ["run_dir=r", "model=olmo_hybrid_tiny", "data.train=[{path: a}]", "train.steps=4", "train.global_batch_size=4"]


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (
            ["data.sequence_length=96", "train.sequence_ramp.start=40"],
            "40 is not data.sequence_length = 96 divided by 2",
        ),
        (
            ["data.sequence_length=64", "train.sequence_ramp.start=64"],
            "start: 64 is not data.sequence_length = 64 divided",
        ),
        (
            ["data.sequence_length=64", "train.sequence_ramp.start=2", "parallel.tensor_parallel_size=4"],
            r"train.sequence_ramp.start: 2 does not fit the layout \(2 is not a multiple of tensor_parallel_size = 4",
        ),
        (
            ["data.sequence_length=64", "train.sequence_ramp.start=2", "parallel.context_parallel_size=4"],
            r"train.sequence_ramp.start: 2 does not fit the layout \(2 is not a multiple of context_parallel_size 4",
        ),
        (
            ["data.sequence_length=64", "train.sequence_ramp.start=4", "parallel.context_parallel_size=4"],
            r"train.sequence_ramp.start: 4 does not fit the layout \(4 leaves 1 tokens of a sequence on each rank",
        ),
    ],
)
def test_a_ramp_that_does_not_fit_names_the_field(overrides, error):
    with pytest.raises(ConfigError, match=error):
        load_run(None, [*BASE, *overrides, "train.sequence_ramp.samples=8"])
