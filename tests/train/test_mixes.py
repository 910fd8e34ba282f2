"""Data mixes that change during a run, and the report of epochs."""

import json
import re

import numpy as np
import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.checkpoint.format import CheckpointError
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.build import build_train_and_validation
from megatron_hybrid.data.fingerprint import data_identity
from megatron_hybrid.train.start import check_start_point, choose_start
from testing import jobs
from tests.train.test_trainer import make_config, metrics


@pytest.fixture
def mixed(tmp_path):
    """A run of 6 steps of 8 samples whose second source begins after two and a half of them."""
    config = make_config(tmp_path)
    np.full(1000, 5, "uint16").tofile(tmp_path / "other.npy")
    config["data"]["train"] = [config["data"]["train"][0], {"path": str(tmp_path / "other.npy"), "weight": 0.0}]
    config["data"]["mix_changes"] = [{"after_tokens": 20 * 16 - 3, "weights": [0.0, 1.0]}]
    config["data"]["repeat_warning"] = 0.4
    config["train"] |= {"batch_ramp": None, "eval_interval": None}
    return config


def test_the_mix_changes_at_the_token_and_does_not_depend_on_ranks_or_restarts(ranks, mixed, tmp_path):
    (out,) = ranks.run(jobs.printed_run, 1, config=mixed)
    assert "epochs: 0.016 of data.train.0, 0.452 of data.train.1" in out
    assert re.search(r"\nsaved step 6 in \d+\.\d s\n", out)
    assert re.search(
        r"\ndone: 6 steps, 768 tokens in 0:00:\d\d, [\d,]+ tokens/s with saves", out.replace("\n ", " ")
    ), out
    assert (tmp_path / "run" / "formats.txt").read_text().startswith("layers ") and "why" not in out
    assert "warning: data.train.1 repeats 0.452 times, more than data.repeat_warning = 0.4; give it more tokens" in out
    parts = mixed | {"run_dir": str(tmp_path / "parts")}
    half = parts | {"train": mixed["train"] | {"steps": 3, "schedule": {"warmup_steps": 2, "decay_steps": 6}}}
    ranks.run(jobs.pretrain_run, 2, config=half)
    ranks.run(jobs.pretrain_run, 2, config=parts)
    one, other = metrics(mixed), metrics(parts)
    assert [line["loss"] for line in other] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert one[5]["loss"] < one[1]["loss"] - 0.1, "the second source is a constant"


def test_the_samples(mixed):
    run = RunConfig(**mixed)
    blend, _ = build_train_and_validation(run.data, run.model.vocab_size, validate=False)
    assert [blend.locate(n)[0] for n in range(18, 23)] == [0, 0, 1, 1, 1], "after 317 tokens, in whole samples of 16"


def test_another_change_of_the_mix_is_refused_on_resuming(ranks, mixed):
    ranks.run(jobs.pretrain_run, 1, config=mixed)
    changed = json.loads(json.dumps(mixed))
    changed["train"]["steps"] = 7
    changed["data"]["mix_changes"][0]["after_tokens"] = 800
    run = RunConfig(**changed)
    blend, _ = build_train_and_validation(run.data, run.model.vocab_size, validate=False)
    with pytest.raises(CheckpointError, match=r"data.mix_changes: \[\[20, \[0.0, 1.0\]\]\] before, \[\[50, "):
        check_start_point(run, choose_start(run, {}), data_identity(blend, run.data.seed))


BASE = ["run_dir=r", "model=olmo_hybrid_tiny", "data.sequence_length=16", "train.steps=4", "train.global_batch_size=1"]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ("[{path: a, weight: 0}]", "data.train: all weights are 0"),
        (
            "[{path: a}, {path: b, weight: 0}]",
            "data.train.1.weight: 0, and no change of the mix gives the source a weight",
        ),
        ("[{path: a}]; [{after_tokens: 5, weights: [1, 1]}]", "data.mix_changes.0.weights: 2 for 1 sources"),
        ("[{path: a}]; [{after_tokens: 5, weights: [0]}]", "data.mix_changes.0.weights: all are 0"),
        (
            "[{path: a}]; [{after_tokens: 5, weights: [1]}, {after_tokens: 16, weights: [2]}]",
            "mix_changes.1.after_tokens: 16 is not a",
        ),
    ],
)
def test_wrong_mixes_name_the_field(data, error):
    train, _, changes = data.partition("; ")
    overrides = [*BASE, f"data.train={train}", *([f"data.mix_changes={changes}"] if changes else [])]
    with pytest.raises(ConfigError, match=error):
        load_run(None, overrides)
