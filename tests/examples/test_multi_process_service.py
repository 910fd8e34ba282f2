"""NVIDIA's Multi-Process Service around concurrent runs, with a program that plays its control daemon."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_hybrid.base.errors import UserError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DAEMON = """#!/bin/bash
[ "$1" = -d ] && { [ -d "$CUDA_MPS_PIPE_DIRECTORY" ] && echo "start $CUDA_MPS_PIPE_DIRECTORY" >> "$LOG"; exit ${STATUS:-0}; }
read word; echo "$word $CUDA_MPS_PIPE_DIRECTORY" >> "$LOG"
"""


@pytest.fixture
def service(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import multi_process_service

    return multi_process_service.multi_process_service


@pytest.fixture
def log(tmp_path, monkeypatch):
    daemon = tmp_path / "bin" / "nvidia-cuda-mps-control"
    daemon.parent.mkdir()
    daemon.write_text(DAEMON)
    daemon.chmod(0o755)
    monkeypatch.setenv("PATH", f"{daemon.parent}:/usr/bin:/bin")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def test_the_service_ends_with_the_runs_also_after_an_error(service, log):
    with pytest.raises(RuntimeError, match="a run"), service(True) as variables:
        pipe = variables["CUDA_MPS_PIPE_DIRECTORY"]
        assert Path(pipe).is_dir() and log.read_text() == f"start {pipe}\n"
        raise RuntimeError("a run")
    assert log.read_text() == f"start {pipe}\nquit {pipe}\n" and not Path(pipe).exists()


def test_without_a_wish_there_is_no_service(service, log):
    with service(False) as variables:
        assert variables == {} and not log.exists()


@pytest.mark.parametrize(
    ("change", "says"), [(("STATUS", "7"), "ended with status 7"), (("PATH", "/none"), "not on PATH")]
)
def test_a_service_that_does_not_start_is_an_error(change, says, service, log, monkeypatch):
    monkeypatch.setenv(*change)
    with pytest.raises(UserError, match=f"--mps: .*{says}"), service(True):
        pass


def test_runs_of_the_service_count_its_gpus(service, log, tmp_path, monkeypatch):
    """The service sees GPUs 3 and 5, and numbers them from 0."""
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    from concurrent_runs import Scheduler
    from origins import Origin

    class Writes:
        is_finished = False

        def __init__(self, number):
            self.folder = tmp_path / f"run{number}"
            self.folder.mkdir()
            self.path = self.folder / "variables"

        def start(self, environment):
            names = "CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY"
            code = f"import os; open({str(self.path)!r}, 'w').write(''.join(os.environ[name] for name in {names}))"
            return subprocess.Popen([sys.executable, "-c", code], env=environment)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    runs, origin = [Writes(number) for number in range(2)], Origin(None, "NVIDIA H200", {})
    with service(True) as variables:
        Scheduler(runs, 2, 1, time.monotonic() + 60, origin, variables).work()
        pipe = variables["CUDA_MPS_PIPE_DIRECTORY"]
    assert sorted(run.path.read_text() for run in runs) == [f"0{pipe}", f"1{pipe}"]
