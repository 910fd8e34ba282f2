"""RunLogger as the trainer calls it, and the sinks behind it."""

import json
import math
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.logging import LoggingConfig
from megatron_hybrid.evaluation.validation_set import SetLoss
from megatron_hybrid.observe import RunLogger, gpu_state
from megatron_hybrid.observe import run_logger as module
from megatron_hybrid.observe.metrics import read_metrics
from megatron_hybrid.observe.sinks import check_sinks

QUIET = LoggingConfig(tensorboard=False, plot_interval=0)


def train(logger, first, last, evaluate=()):
    for step in range(first, last + 1):
        values = {"loss": torch.tensor(4.0 / step), "z_loss": 0.1, "grad_norm": 1.0, "lr": 1e-3, "tokens": step * 1000}
        logger.log_step(step, values | {"skipped": "loss is nan" if step == 3 else None})
        if step in evaluate:
            with logger.pause():
                logger.log_evaluation(step, {"": SetLoss(2.0, 8, math.nan), "code": SetLoss(3.0, 1, 2.0)})


def logged(run_dir):
    return {record["step"]: record for record in read_metrics(run_dir / "metrics.jsonl")}


def test_a_run(tmp_path, capsys):
    config = LoggingConfig(plot_interval=5, peak_tflops=100.0)
    with RunLogger(config, tmp_path, 0, total_steps=10, flops_per_token=1e9, num_devices=4) as logger:
        train(logger, 1, 5)
        assert (tmp_path / "loss.png").exists()
        train(logger, 6, 10, evaluate=(10,))
    records = logged(tmp_path)
    assert list(records) == list(range(1, 11))
    one = records[10]
    assert one["loss"] == pytest.approx(0.4) and one["tokens"] == 10_000 and one["eval_loss"] == 2.0
    assert (
        one["eval_tokens"] == 8 and "eval_bits_per_byte" not in one and one["memory_gb"] > 0 and one["skipped"] is False
    )
    assert one["tokens_per_s"] == pytest.approx(1000 / one["seconds"])
    assert one["tflops"] == pytest.approx(one["tokens_per_s"] * 1e9 / 4 / 1e12)
    assert one["mfu"] == pytest.approx(one["tflops"] / 100)
    assert 0 < one["goodput"] < 1 and one["goodput_tokens_per_s"] < 10_000 / sum(r["seconds"] for r in records.values())
    assert records[3]["skipped"] is True and records[3]["skip_reason"] == "loss is nan"
    assert one["eval/code/loss"] == 3 and one["eval/code/perplexity"] == pytest.approx(math.e**3)
    assert one["eval/code/bits_per_byte"] == pytest.approx(3 / math.log(2) / 2)
    out = capsys.readouterr().out
    assert "step 1/10  loss 4.0000" in out and "SKIPPED: loss is nan" in out
    assert "step 10/10  evaluation: loss 2.0000, perplexity 7.389\n" in out
    assert "step 10/10  evaluation of code: loss 3.0000, perplexity 20.09, 2.1640 bits per byte" in out

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 11))
    assert [events.Scalars(tag)[0].value for tag in ("eval/loss", "eval/code/loss")] == [2.0, 3.0]
    assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {"train", "eval", "perf"}
    assert "perf/mfu" in events.Tags()["scalars"]
    assert [e.value for e in events.Scalars("train/skipped")] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_resuming(tmp_path):
    config = LoggingConfig(plot_interval=0)
    with RunLogger(config, tmp_path, 0, total_steps=10) as logger:
        train(logger, 1, 8)
    with RunLogger(config, tmp_path, 0, total_steps=10, start_step=5, start_tokens=5000) as logger:
        train(logger, 6, 10)
    records = logged(tmp_path)
    assert list(records) == list(range(1, 11))
    assert records[6]["tokens_per_s"] == pytest.approx(1000 / records[6]["seconds"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 11))


def test_interval_keeps_first_last_skipped_and_evaluated_steps(tmp_path):
    config = LoggingConfig(tensorboard=False, plot_interval=0, interval=4)
    with RunLogger(config, tmp_path, 0, total_steps=11) as logger:
        train(logger, 1, 11, evaluate=(4, 6))
    records = logged(tmp_path)
    assert list(records) == [1, 3, 4, 6, 8, 11]
    assert records[6]["loss"] == pytest.approx(4 / 6) and records[6]["eval_loss"] == records[4]["eval_loss"] == 2.0


def test_evaluation_before_the_first_step(tmp_path):
    with RunLogger(QUIET, tmp_path, 0, total_steps=2) as logger:
        logger.log_evaluation(0, {"": SetLoss(5.5, 4, math.nan)})
        train(logger, 1, 2)
    assert logged(tmp_path)[0] == {"step": 0, "eval_loss": 5.5, "eval_perplexity": math.exp(5.5), "eval_tokens": 4}


def test_other_ranks_write_nothing(tmp_path, capsys):
    with RunLogger(LoggingConfig(), tmp_path, 3, total_steps=2) as logger:
        train(logger, 1, 2, evaluate=(2,))
        logger.info("nothing")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_not_finite_values(tmp_path):
    with RunLogger(LoggingConfig(plot_interval=0), tmp_path, 0, total_steps=1) as logger:
        logger.log_step(1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 10, "skipped": "loss is nan"})
        logger.log_evaluation(1, {"": SetLoss(math.nan, 0, math.nan)})
    record = logged(tmp_path)[1]
    assert record["loss"] is record["grad_norm"] is record["eval_loss"] is None


def test_given_values_take_precedence(tmp_path):
    with RunLogger(QUIET, tmp_path, 0, total_steps=1) as logger:
        logger.log_step(1, {"loss": 1.0, "memory_gb": 79.0})
    assert logged(tmp_path)[1]["memory_gb"] == 79.0


def test_an_unknown_device_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "memory_gb", lambda cuda: 1.0)
    arguments = dict(total_steps=1, flops_per_token=1e9)
    with RunLogger(QUIET, tmp_path, 0, device_name="Future GPU", **arguments) as logger:
        train(logger, 1, 1)
    assert "the peak of 'Future GPU' is not known; set logging.peak_tflops" in capsys.readouterr().out
    assert "mfu" not in logged(tmp_path)[1]
    with RunLogger(QUIET, tmp_path, 0, device_name="NVIDIA H100 80GB HBM3", **arguments) as logger:
        train(logger, 1, 1)
    assert logged(tmp_path)[1]["mfu"] == pytest.approx(logged(tmp_path)[1]["tflops"] / 989)


def test_an_exception_leaves_the_file_whole_and_the_plot_drawn(tmp_path):
    with pytest.raises(RuntimeError), RunLogger(QUIET, tmp_path, 0, total_steps=5) as logger:
        train(logger, 1, 2)
        raise RuntimeError
    assert list(logged(tmp_path)) == [1, 2] and (tmp_path / "loss.png").exists()
    logger.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("field, value", [("wandb_project", "mine"), ("tensorboard", True)])
def test_a_sink_that_is_not_installed_fails_at_start_on_every_rank(tmp_path, monkeypatch, rank, field, value):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(ValueError, match=f"logging.{field} = .* not installed: pip install"):
        RunLogger(LoggingConfig(**({"tensorboard": False} | {field: value})), tmp_path, rank, total_steps=1)


def test_wandb(tmp_path, monkeypatch):
    calls = []

    class Run:
        id = "abc123"

        def define_metric(self, *a, **k):
            calls.append(("define", a, k))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    fake = types.ModuleType("wandb")
    fake.init = lambda **k: (calls.append(("init", k)), Run())[1]
    fake.login = lambda prompt, verify: not prompt and not verify
    fake.Error = Exception
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LoggingConfig(
        tensorboard=False,
        plot_interval=0,
        wandb_project="mine",
        wandb_entity="team",
        wandb_name="run 7",
        wandb_tags=("a", "b"),
    )
    for start, continues in ((0, False), (2, True), (1, False)):
        common = dict(total_steps=4, start_step=start, settings={"a": 1}, continues=continues)
        with RunLogger(config, tmp_path, 0, **common) as logger:
            train(logger, start + 1, 4)
    inits = [c[1] for c in calls if c[0] == "init"]
    assert [i["id"] for i in inits] == [None, "abc123", None], (
        "a run that is new or rewound does not join the one before"
    )
    assert [inits[0][k] for k in ("entity", "project", "name", "tags", "mode")] == [
        "team",
        "mine",
        "run 7",
        ("a", "b"),
        None,
    ]
    assert inits[0]["config"] == {"a": 1} and inits[0]["resume"] == "allow"
    logs = [c[1] for c in calls if c[0] == "log"]
    assert [values["step"] for values in logs] == [1, 2, 3, 4, 3, 4, 2, 3, 4]
    assert all(isinstance(v, int | float) for v in logs[0].values())
    assert [c for c in calls if c[0] == "finish"] == [("finish",)] * 3


def test_the_gpu_s_state_is_logged_as_means_of_the_interval(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "memory_gb", lambda cuda: 1.0)
    now, watts = [0.0], iter([700.0, 500.0, 600.0])

    def read():
        return {"power_w": next(watts), "sm_clock_mhz": 1470.0}

    monkeypatch.setattr(gpu_state, "_read", read)
    config = QUIET.model_copy(update={"interval": 2})
    with RunLogger(config, tmp_path, 0, total_steps=4, device_name="NVIDIA H200") as logger:
        logger._gpu._now = lambda: now[0]
        for step in range(1, 5):
            now[0] += 1.5 if step < 4 else 0.5  # less than a second after the last reading
            train(logger, step, step)
    assert [r.get("power_w") for r in logged(tmp_path).values()] == [700.0, 500.0, 600.0, None]


def test_a_gpu_that_does_not_tell_its_state_is_reported_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "memory_gb", lambda cuda: 1.0)
    calls = []

    def read():
        calls.append(1)
        raise ModuleNotFoundError("no pynvml")

    monkeypatch.setattr(gpu_state, "_read", read)
    with RunLogger(QUIET, tmp_path, 0, total_steps=4, device_name="NVIDIA H200") as logger:
        train(logger, 1, 4)
    assert len(calls) == 1 and len(logged(tmp_path)) == 4
    assert capsys.readouterr().out.count("nvidia-ml-py is not installed: pip install nvidia-ml-py") == 1


def with_wandb(monkeypatch, login):
    fake = types.ModuleType("wandb")
    fake.login, fake.Error = login, KeyError
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)


def test_missing_credentials_are_an_error_before_the_run(tmp_path, monkeypatch):
    config = LoggingConfig(tensorboard=False, wandb_project="mine")
    with_wandb(monkeypatch, lambda prompt, verify: False)
    with pytest.raises(
        UserError, match="logging.wandb_project: no usable credentials .* set WANDB_API_KEY, or set logging.wandb_off"
    ):
        check_sinks(config, tmp_path)
    check_sinks(config, tmp_path, writes=False)
    check_sinks(config.model_copy(update={"wandb_offline": True}), tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_sinks(config, tmp_path)


def test_wrong_credentials_are_an_error_before_the_run(tmp_path, monkeypatch):
    def login(prompt, verify):
        raise KeyError("API key must have 40+ characters")

    with_wandb(monkeypatch, login)
    with pytest.raises(UserError, match="40\\+ characters"):
        check_sinks(LoggingConfig(tensorboard=False, wandb_project="mine"), tmp_path)


def test_a_file_in_the_place_of_a_sink_s_folder_is_an_error(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="logging.tensorboard: .*/tensorboard is a file"):
        check_sinks(LoggingConfig(), tmp_path)


@pytest.mark.parametrize("field, value", [("entity", "team"), ("name", "a"), ("tags", ["a"]), ("offline", True)])
def test_fields_of_wandb_need_a_project(field, value):
    with pytest.raises(ValueError, match=f"wandb_{field}: has no effect without wandb_project"):
        LoggingConfig(**{f"wandb_{field}": value})


def test_the_file_is_json_to_anyone(tmp_path):
    with RunLogger(QUIET, tmp_path, 0, total_steps=3) as logger:
        train(logger, 1, 3)

    def refuse(name):
        raise ValueError(name)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
