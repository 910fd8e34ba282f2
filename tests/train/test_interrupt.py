"""Signals that end a run early: all ranks at the same step, with a checkpoint, and no number changed by it."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from megatron_hybrid.train.interrupt import RECORD, RestartError, check_restarts
from tests.train import interrupt_jobs
from tests.train.test_trainer import config, metrics  # noqa: F401 - config is a fixture


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_ranks_agree_whoever_is_asked(ranks, asked):
    results = ranks.run(interrupt_jobs.votes, 3, asked=asked, at=2)
    assert all(result["answers"] == [False, False, False, True, True, True] for result in results)
    assert all(result["restored"] for result in results)


def test_nobody_is_asked(ranks):
    assert all(not any(result["answers"]) for result in ranks.run(interrupt_jobs.votes, 2, asked=None, at=0))


@pytest.mark.parametrize(
    "signum, async_save", [(signal.SIGUSR1, True), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False)]
)
def test_a_signal_on_one_rank_saves_the_same_step_on_all(ranks, config, tmp_path, signum, async_save):  # noqa: F811
    config["checkpoint"] |= {"interval": None, "async_save": async_save}
    run = dict(signum=signum, at=2, rank=1)
    results = ranks.run(interrupt_jobs.interrupted, 2, config=config, **run)
    assert [result["step"] for result in results] == [3, 3], "the step after the one in which the signal came"
    assert results[0]["saved"] == ["step-00000003"], "whole, whichever rank ends first"
    ranks.run(interrupt_jobs.interrupted, 2, config=config, **run | {"at": 99})
    straight = config | {"run_dir": str(tmp_path / "straight")}
    ranks.run(interrupt_jobs.interrupted, 2, config=straight, **run | {"at": 99})
    keys = ("step", "loss", "grad_norm", "lr")
    assert [[line[k] for k in keys] for line in metrics(config)] == [[l[k] for k in keys] for l in metrics(straight)]


def test_a_signal_in_the_last_step_is_no_interruption(ranks, config):  # noqa: F811
    results = ranks.run(interrupt_jobs.interrupted, 2, config=config, signum=signal.SIGUSR1, at=6, rank=0)
    assert [result["step"] for result in results] == [6, 6]


def attempt(run_dir, step: int, restart: int, job: str = "9") -> None:
    check_restarts(run_dir, step, {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)})


def test_three_restarts_without_a_step_stop_a_job(tmp_path):
    for restart in range(4):
        attempt(tmp_path, 0, restart)
    with pytest.raises(
        RestartError, match="job 9 has restarted 3 times without a step beyond 0; .*submit the run again"
    ):
        attempt(tmp_path, 0, 4)
    attempt(tmp_path, 0, 0, job="10")


def test_a_step_forgives_the_restarts_before_it(tmp_path):
    for restart, step in enumerate([0, 0, 0, 0, 5, 5, 5, 5]):
        attempt(tmp_path, step, restart)
    with pytest.raises(RestartError, match="beyond 5"):
        attempt(tmp_path, 5, 8)


@pytest.mark.parametrize(
    "content", ["", "\0" * 20, "[]", "{}", '{"job": "9", "step": 0, "restarts_without_a_step": "x"}', "{"]
)
def test_a_damaged_record_is_reported_and_stops_nothing(tmp_path, capsys, content):
    (tmp_path / RECORD).write_text(content)
    attempt(tmp_path, 0, 1)
    assert f"{tmp_path / RECORD} is damaged" in capsys.readouterr().out
    assert json.loads((tmp_path / RECORD).read_text()) == {"job": "9", "step": 0, "restarts_without_a_step": 0}


def test_a_record_that_cannot_be_read_is_reported_and_kept(tmp_path, capsys):
    (tmp_path / RECORD).mkdir()
    attempt(tmp_path, 0, 1)
    assert f"{tmp_path / RECORD} cannot be read or written: Is a directory; this restart is" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_starts_by_hand_are_not_counted(tmp_path):
    for _ in range(9):
        check_restarts(tmp_path / "new", 0, {})
    assert json.loads((tmp_path / "new" / RECORD).read_text())["restarts_without_a_step"] == 0


def test_the_command_ends_with_78_when_a_job_restarts_in_vain(root, config, tmp_path):  # noqa: F811
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"run_dir": str(tmp_path / "run")}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RECORD).write_text('{"job": "9", "step": 0, "restarts_without_a_step": 3}')
    done = subprocess.run(
        [sys.executable, "tools/pretrain.py", str(path)],
        cwd=root,
        env=os.environ | {"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "4"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 78, done.stderr
    assert "restarted 3 times without a step beyond 0" in done.stderr and "Traceback" not in done.stderr
