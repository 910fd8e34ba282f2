"""The training loop on two ranks: what it writes, that it resumes bit for bit, that a bad step changes nothing."""

import json
import math

import numpy as np
import pytest
import torch

from megatron_hybrid.checkpoint.folders import complete_checkpoints
from testing import jobs
from testing.models import SMALLEST


@pytest.fixture
def config(tmp_path):
    """A run of 6 steps on learnable tokens, evaluated and saved every 3."""
    return make_config(tmp_path)


def make_config(tmp_path) -> dict:
    """That run, in any folder."""
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(0, 3, 20_000)) % 97
    tokens.astype("uint16").tofile(tmp_path / "tokens.npy")
    source = [{"path": str(tmp_path / "tokens.npy")}]
    return dict(
        run_dir=str(tmp_path / "run"),
        model=SMALLEST,
        data=dict(train=source, validation=source, sequence_length=16),
        train=dict(
            steps=6,
            global_batch_size=8,
            micro_batch_size=2,
            dtype="fp32",
            eval_interval=3,
            eval_batches=2,
            optimizer=dict(lr=3e-3),
            schedule=dict(warmup_steps=2),
            batch_ramp=dict(start=4, increment=4, samples=16),
        ),
        checkpoint=dict(interval=3),
        logging=dict(plot_interval=0),
    )


def metrics(config) -> list[dict]:
    with open(f"{config['run_dir']}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def test_a_run_leaves_what_it_should(ranks, config, tmp_path):
    results = ranks.run(jobs.pretrain_run, 2, config=config)
    assert results[0]["progress"] == {"step": 6, "samples": 32, "tokens": 32 * 16, "updates": 6}
    lines = metrics(config)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["batch_size"] for line in lines] == [4, 4, 4, 4, 8, 8], "the ramp"
    assert [line["lr"] for line in lines][:2] == [1.5e-3, 3e-3], "the warm-up"
    assert lines[-1]["tokens"] == 32 * 16 and lines[-1]["tokens_per_s"] > 0 and lines[-1]["tflops"] > 0
    assert abs(lines[0]["loss"] - math.log(97)) < 0.1 and lines[-1]["loss"] < lines[0]["loss"]
    assert abs(lines[0]["z_loss"] - math.log(97) ** 2) < 0.5
    assert [line["step"] for line in lines if line.get("eval_loss")] == [3, 6]
    run = tmp_path / "run"
    assert {"config.yaml", "metrics.jsonl", "loss.png", "tensorboard", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert [p.name for p in complete_checkpoints(run / "checkpoints")] == ["step-00000003", "step-00000006"]


def test_an_interrupted_run_goes_on_bit_for_bit(ranks, config, tmp_path):
    straight = ranks.run(jobs.pretrain_run, 2, config=config | {"run_dir": str(tmp_path / "straight")})
    half = config | {"train": config["train"] | {"steps": 3, "schedule": {"warmup_steps": 2, "decay_steps": 6}}}
    ranks.run(jobs.pretrain_run, 2, config=half)
    resumed = ranks.run(jobs.pretrain_run, 2, config=config)
    for one, other in zip(straight, resumed, strict=True):
        assert one["progress"] == other["progress"] and one["window"] == other["window"]
        for what in ("parameters", "moments"):
            assert one[what].keys() == other[what].keys()
            for name, value in one[what].items():
                assert torch.equal(value, other[what][name]), name
    expected, found = metrics(config | {"run_dir": str(tmp_path / "straight")}), metrics(config)
    for key in ("step", "loss", "z_loss", "grad_norm", "lr", "tokens", "batch_size"):
        assert [line[key] for line in found] == [line[key] for line in expected], key


def test_context_parallel_ranks_read_the_same_samples(ranks, config, tmp_path):
    """A whole run, its evaluations and its checkpoint as well, is the same over one rank's sequences and over slices of them."""
    for name, count, parallel in (("one", 1, {}), ("slices", 2, dict(context_parallel_size=2))):
        ranks.run(jobs.pretrain_run, count, config=config | {"run_dir": str(tmp_path / name), "parallel": parallel})
    one, slices = (metrics({"run_dir": str(tmp_path / name)}) for name in ("one", "slices"))
    assert len(one) == len(slices) == 6
    for key in ("loss", "z_loss", "grad_norm", "eval_loss"):
        expected = [line[key] for line in one if key in line]
        assert expected and [line[key] for line in slices if key in line] == pytest.approx(expected, rel=1e-4), key
    for key in ("tokens", "batch_size", "lr", "step"):
        assert [line[key] for line in slices] == [line[key] for line in one], key


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("parallel", [dict(), dict(tensor_parallel_size=2), dict(distributed_optimizer=False)])
def test_a_gradient_that_is_not_finite_changes_nothing(ranks, value, parallel):
    train = dict(steps=3, global_batch_size=4, dtype="fp32")
    for result in ranks.run(
        jobs.step_with_bad_gradient, 2, model=SMALLEST, parallel=parallel, train=train, value=value, bad_rank=0
    ):
        before, bad, after = result["states"]
        assert [reason is None for reason in result["reasons"]] == [True, False, True]
        assert not math.isfinite(result["norms"][1])
        for what in ("parameters", "moments"):
            assert all(torch.equal(before[what][name], bad[what][name]) for name in before[what]), "bit-unchanged"
            assert any(not torch.equal(bad[what][name], after[what][name]) for name in after[what]), (
                "the next step trains"
            )


def test_another_models_checkpoint_is_refused(ranks, config):
    ranks.run(jobs.pretrain_run, 1, config=config)
    wider = config | {"model": SMALLEST | {"ffn_hidden_size": 96}}
    with pytest.raises(AssertionError, match=r"model.ffn_hidden_size is 64 there and 96 in this run"):
        ranks.run(jobs.pretrain_run, 1, config=wider)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_new_stage_starts_from_anothers_weights_alone(dtype, ranks, config, tmp_path):
    first = config | {"train": config["train"] | {"dtype": dtype}}
    (one, _) = ranks.run(jobs.pretrain_run, 2, config=first)
    second = first | {
        "run_dir": str(tmp_path / "stage2"),
        "train": first["train"] | {"steps": 3, "optimizer": dict(lr=1e-9)},
        "checkpoint": dict(interval=3, init_from=first["run_dir"]),
    }
    (two, _) = ranks.run(jobs.pretrain_run, 2, config=second)
    assert two["progress"]["step"] == 3 and metrics(second)[0]["step"] == 1
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=1e-4 if dtype == "fp32" else 1e-2, atol=1e-6)


def test_a_pattern_may_be_written_another_way_and_rope_may_be_dropped_where_that_is_allowed(ranks, config):
    ranks.run(jobs.pretrain_run, 1, config=config)
    again = config | {"model": SMALLEST | {"layer_pattern": "G,A", "rope_theta": None, "head_dim": 16}}
    again["train"] = config["train"] | {"steps": 7}
    with pytest.raises(
        AssertionError, match=r"model\.rope_theta: 500000.0 before, null now\nWith these, the trained weights"
    ):
        ranks.run(jobs.pretrain_run, 1, config=again)
    again["checkpoint"] = config["checkpoint"] | {"allow_changes": ["model.rope_theta"]}
    (result,) = ranks.run(jobs.pretrain_run, 1, config=again)
    assert result["progress"]["step"] == 7
