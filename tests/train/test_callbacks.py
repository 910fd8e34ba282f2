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
