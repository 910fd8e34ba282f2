"""The order of callback hooks, the state of callbacks in checkpoints, and callbacks that skip updates or stop a run."""

import json

from tests.train import callback_jobs
from tests.train.test_trainer import config, metrics  # noqa: F401 - config is a fixture


def run(ranks, config, **options):  # noqa: F811
    config["train"] |= {"steps": 3, "eval_interval": None, "schedule": {"decay_steps": 6}}
    config["checkpoint"] = {"interval": 2}
    return ranks.run(callback_jobs.recorded, 1, config=config, **options)[0]


def test_hooks_come_in_order(ranks, config):  # noqa: F811
    hooks = run(ranks, config)["hooks"]
    step = ["begin_step", "reason_to_skip", "end_step"]
    assert hooks == ["setup", "start", *step * 3, "finish", "close"]


def test_state_is_saved_and_restored(ranks, config, tmp_path):  # noqa: F811
    assert run(ranks, config)["seen"] == [1, 2, 3]
    index = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "index.json").read_text())
    assert index["state"]["recorder"] == {"seen": [1, 2, 3]}
    config["train"]["steps"] = 4
    (again,) = ranks.run(callback_jobs.recorded, 1, config=config)
    assert again["seen"] == [1, 2, 3, 4]


def test_a_callback_skips_an_update(ranks, config):  # noqa: F811
    assert run(ranks, config, skip_at=2)["progress"] == {"step": 3, "samples": 12, "tokens": 192, "updates": 2}
    reasons = [line.get("skip_reason") for line in metrics(config)]
    assert reasons == [None, "recorder says so", None]


def test_a_callback_stops_the_run_with_a_checkpoint(ranks, config, tmp_path):  # noqa: F811
    assert run(ranks, config, stop_at=1)["progress"]["step"] == 1
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_endpoints_of_a_ladder_are_evaluated_and_a_stop_between_them_changes_nothing(ranks, config, tmp_path):  # noqa: F811
    schedule = dict(kind="wsd_s", warmup_steps=1, decay_steps=1, endpoints=[2, 4], min_lr_ratio=0.0)
    config["train"] |= {"eval_interval": 5, "schedule": schedule, "batch_ramp": None}
    straight = config | {"run_dir": str(tmp_path / "straight")}
    ranks.run(callback_jobs.recorded, 1, config=straight)
    for stop_at in (3, None):
        ranks.run(callback_jobs.recorded, 1, config=config, stop_at=stop_at)
    expected, found = metrics(straight), metrics(config)
    assert [line["step"] for line in expected if "eval_loss" in line] == [2, 4, 5, 6]
    assert [line["lr"] for line in expected] == [3e-3, 0, 3e-3, 0, 3e-3, 0]
    for key in ("step", "loss", "grad_norm", "lr", "eval_loss"):
        assert [line.get(key) for line in found] == [line.get(key) for line in expected], key
