"""Runs of the trainer with Muon: metrics, resuming, and a change of the optimizer."""

import pytest
import torch

from megatron_hybrid.checkpoint.format import CheckpointError
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.train.start import check_start_point, choose_start
from testing import jobs
from testing.muon import NOT_HERE, REASON
from tests.train.test_trainer import make_config, metrics

if NOT_HERE:
    pytest.skip(REASON, allow_module_level=True)


def with_optimizer(config: dict, **optimizer) -> dict:
    return config | {"train": config["train"] | {"optimizer": optimizer}}


def check(config: dict) -> None:
    run = RunConfig(**config)
    check_start_point(run, choose_start(run), None)


def test_a_run_resumes_bit_for_bit_and_only_with_its_optimizer(ranks, tmp_path):
    config = with_optimizer(make_config(tmp_path), kind="muon", lr=3e-3, muon_extra_scale_factor=0.2)
    straight = ranks.run(jobs.pretrain_run, 2, config=config | {"run_dir": str(tmp_path / "straight")})
    half = config | {"train": config["train"] | {"steps": 3, "schedule": {"warmup_steps": 2, "decay_steps": 6}}}
    ranks.run(jobs.pretrain_run, 2, config=half)
    check(config)
    for changed, states in (
        (with_optimizer(config, kind="adamw"), "exp_avg, exp_avg_sq"),
        (config | {"checkpoint": {"init_from": config["run_dir"], "take": "moments"}, "run_dir": "x"}, None),
        (config | {"checkpoint": {"init_from": config["run_dir"], "take": "weights"}, "run_dir": "x"}, None),
    ):
        if states is None:
            check(changed)
            continue
        with pytest.raises(CheckpointError, match=f"train.optimizer.kind: adamw, .* does not hold {states} of all"):
            check(changed)
    resumed = ranks.run(jobs.pretrain_run, 2, config=config)
    for one, other in zip(straight, resumed, strict=True):
        assert one["progress"] == other["progress"] and one["progress"]["updates"] == 6
        for what in ("parameters", "moments"):
            assert one[what].keys() == other[what].keys()
            assert all(torch.equal(value, other[what][name]) for name, value in one[what].items())
    losses = [line["loss"] for line in metrics(config)]
    assert losses[-1] < losses[0] - 0.01
