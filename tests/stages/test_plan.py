"""Files of stages, their checks, and the commands and jobs that follow from them."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.stages import execute
from megatron_hybrid.stages.check import check_work
from megatron_hybrid.stages.config import load_stages
from megatron_hybrid.stages.execute import StagesError, run_all, shell_script, submit_all
from megatron_hybrid.stages.plan import Average, plan_work
from tests.train.test_trainer import make_config

STAGES = [
    {"name": "first", "config": "run.yaml"},
    {"name": "a", "config": "run.yaml", "overrides": ["data.seed=1"], "from": "first", "take": "moments"},
    {
        "name": "b",
        "config": "run.yaml",
        "overrides": ["data.seed=2", "train.steps=5"],
        "from": "first",
        "take": "moments",
    },
    {"name": "last", "config": "long.yaml", "from": "average(a, b)", "take": "moments", "slurm": ["--nodes=4"]},
]


@pytest.fixture
def planned(tmp_path):
    """`planned(stages, *overrides)`: writes the files and returns their work and the configuration of the stages."""
    config = make_config(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "long.yaml").write_text("extends: run.yaml\nmodel: {rope_theta: null}\ndata: {sequence_length: 32}")

    def plan(stages: list[dict], *overrides: str):
        file = tmp_path / "stages.yaml"
        slurm = {"options": ["--gpus-per-node=8"]}
        file.write_text(yaml.safe_dump({"folder": str(tmp_path / "all"), "stages": stages, "slurm": slurm}))
        loaded = load_stages(file)
        return plan_work(loaded, file, overrides), loaded

    return plan


def finish(item) -> None:
    """Leave what the item's command leaves."""
    folder = item.folder if isinstance(item, Average) else item.last_checkpoint
    folder.mkdir(parents=True)
    (folder / "index.json").write_text("{}")


def test_runs_and_averages_in_order(planned, tmp_path):
    work, _ = planned(STAGES, "train.z_loss=0")
    average = "average-a-b-moments"
    assert [item.name for item in work] == ["first", "a", "b", average, "last"]
    assert [item.needs for item in work] == [(), ("first",), ("first",), ("a", "b"), (average,)]
    all_stages = tmp_path / "all"
    steps = [all_stages / name / "checkpoints" / f"step-0000000{step}" for name, step in (("a", 6), ("b", 5))]
    assert work[3].arguments == [*map(str, steps), "--out", str(all_stages / average), "--quiet", "--moments"]
    last = work[4].run(with_start=True)
    assert last.checkpoint.init_from == str(all_stages / average) and last.checkpoint.take == "moments"
    assert last.run_dir == str(all_stages / "last") and last.train.z_loss == 0 and last.model.rope_theta is None


def test_the_dry_run_reports_states_and_changes(planned):
    work, _ = planned(STAGES)
    finish(work[0])
    lines = check_work(work, 2, "warn")
    assert lines[0] == "first: done; 6 steps, 512 tokens, from initial weights"
    assert "a: to do; 6 steps, 512 tokens, from the moments of first" in lines
    assert "  model.rope_theta 500000.0 -> null" in lines and "  data.sequence_length 16 -> 32" in lines


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"overrides": ["model.ffn_hidden_size=96"]}, "model.ffn_hidden_size is 64 there and 96 in this run"),
        ({"overrides": ["model.norm_eps=0.1"]}, "b: .*model.norm_eps: 1e-06 before, 0.1 now"),
        ({"overrides": ["train.global_batch_size=7", "train.batch_ramp=null"]}, "b: train.global_batch_size"),
        ({"overrides": ["data.train.0.path=none"]}, "b: data.train.0.path: none"),
    ],
)
def test_all_stages_are_checked_before_the_first_runs(change, error, planned):
    stages = copy.deepcopy(STAGES)
    stages[2] |= change
    with pytest.raises(ConfigError, match=f"(?s){error}"):
        check_work(planned(stages)[0], 2, "require")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"name": "a"}, "stages.2.name: a is the name of an earlier stage"),
        ({"from": "frist"}, "stages.2.from: 'frist' is not an earlier stage; the nearest is first"),
        ({"from": "last"}, "stages.2.from: 'last' is not an earlier stage"),
        ({"from": "average(a)"}, r"stages.2.from: 'average\(a\)' names fewer than two stages"),
        ({"from": "average(a, first)", "take": "everything"}, "stages.2.take: everything of an average is its moments"),
        ({"from": None}, "stages.2.take: moments has nothing to take from; name a stage in from"),
        ({"name": "B b"}, "stages.2.name"),
        ({"take": "momentum"}, "stages.2.take"),
    ],
)
def test_wrong_files_name_the_field(change, error, planned):
    stages = copy.deepcopy(STAGES)
    stages[2] |= change
    with pytest.raises(ConfigError, match=error):
        planned(stages)


def test_jobs_depend_on_the_stages_they_start_from(planned, tmp_path):
    work, config = planned(STAGES)
    finish(work[0])
    lines = shell_script(work, config.slurm)[1:]
    assert [line.partition("=$(")[0] for line in lines] == ["job_a", "job_b", "job_average_a_b_moments", "job_last"]
    assert "--dependency" not in lines[0], "its input is there"
    assert lines[0].startswith(
        f"job_a=$(CONFIG={tmp_path / 'run.yaml'} sbatch --parsable --job-name=a --gpus-per-node=8 "
    )
    assert '"--dependency=afterok:$job_a:$job_b" --kill-on-invalid-dep=yes --nodes=1 --ntasks=1 ' in lines[2]
    assert (
        '"--dependency=afterok:$job_average_a_b_moments" --kill-on-invalid-dep=yes --gpus-per-node=8 --nodes=4 '
        in lines[3]
    )
    assert subprocess.run(["bash", "-n"], input="\n".join(lines), text=True).returncode == 0


def test_submission(planned, tmp_path, monkeypatch, capsys):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    log = tmp_path / "log"
    sbatch.write_text(
        f'#!/bin/bash\necho "$CONFIG|$*" >> {log}\n[ $(wc -l < {log}) -lt 4 ] || {{ echo refused >&2; exit 1; }}\n'
        f"wc -l < {log}\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    work, config = planned(STAGES)
    finish(work[0])
    with pytest.raises(StagesError, match="last: refused; cancel 1 2 3 before you submit again"):
        submit_all(work, config.slurm)
    lines = log.read_text().splitlines()
    assert "--dependency=afterok:1:2 " in lines[2] and "--dependency=afterok:3 " in lines[3]
    assert capsys.readouterr().out.splitlines()[:2] == ["a: job 1", "b: job 2"]


def test_a_failure_ends_with_its_status_and_the_next_call_continues(planned, tmp_path, monkeypatch):
    work, _ = planned(STAGES)
    ran, statuses, plots = [], {"b": 75}, []

    def command(item, launcher):
        ran.append(item.name)
        if statuses.get(item.name) is None:
            finish(item)
        return [sys.executable, "-c", f"raise SystemExit({statuses.pop(item.name, 0)})"]

    monkeypatch.setattr(execute, "local_command", command)
    assert run_all(work, [], lambda: plots.append(1)) == 75
    assert ran == ["first", "a", "b"] and len(plots) == 2
    assert run_all(work, [], lambda: plots.append(1)) == 0
    assert ran == ["first", "a", "b", "b", "average-a-b-moments", "last"]
    assert run_all(work, [], lambda: plots.append(1)) == 0 and len(ran) == 6 and len(plots) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_stop_in_the_last_step_of_a_stage_starts_no_other(planned, monkeypatch, number):
    work, _ = planned(STAGES)
    ran = []

    def command(item, launcher):
        ran.append(item.name)
        finish(item)
        return [sys.executable, "-c", IGNORES_REQUESTS, str(os.getpid()), str(int(number))]

    monkeypatch.setattr(execute, "local_command", command)
    assert run_all(work, [], lambda: None) == 75 and ran == ["first"]


def test_a_plot_that_fails_ends_nothing(planned, monkeypatch, capsys):
    work, _ = planned(STAGES)
    monkeypatch.setattr(execute, "local_command", lambda item, launcher: [finish(item), "true"][1:])
    assert run_all(work, [], lambda: Path("/dev/null/plot").write_text("")) == 0 and all(item.done for item in work)
    assert capsys.readouterr().out.count("the plot of the stages cannot be written: NotADirectoryError") == 1


def test_a_command_that_leaves_nothing_is_an_error(planned, monkeypatch):
    work, _ = planned(STAGES)
    monkeypatch.setattr(execute, "local_command", lambda item, launcher: ["true"])
    with pytest.raises(StagesError, match="first: its command succeeded and left no last checkpoint"):
        run_all(work, [], lambda: None)


def test_the_shipped_stages_are_valid(root):
    for file in sorted((root / "examples" / "stages").glob("*/stages.yaml")):
        work = plan_work(load_stages(file), file)
        ranks = 2 if "tiny" in str(file) else 128
        assert check_work(work, ranks, "skip") and len(work) == 5, json.dumps([item.name for item in work])


IGNORES_REQUESTS = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
os.kill(int(sys.argv[1]), int(sys.argv[2]))
"""
SAVES_ON_SIGTERM = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def test_a_signal_reaches_the_running_stage(planned, tmp_path, monkeypatch):
    work, _ = planned(STAGES)
    ready, before = tmp_path / "ready", signal.getsignal(signal.SIGTERM)
    command = [sys.executable, "-c", SAVES_ON_SIGTERM, str(ready)]
    monkeypatch.setattr(execute, "local_command", lambda item, launcher: command)

    def send() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert run_all(work, [], lambda: None) == 75
    assert signal.getsignal(signal.SIGTERM) is before
