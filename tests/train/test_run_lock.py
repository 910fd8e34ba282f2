"""A run folder belongs to one run: who gets it, who is refused, and when a lock is taken over."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from megatron_hybrid.train import run_lock
from megatron_hybrid.train.run_lock import LOCK, Owner, RunFolderError, RunLock, read_owner


def hold(folder, process: dict | None = None, **changes) -> Owner:
    """Write the lock of another process: this one's owner with other fields."""
    owner = Owner.this_process()
    owner = replace(owner, process=replace(owner.process, **(process or {})), **changes)
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    return owner


@pytest.fixture
def dead_process():
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_a_second_run_is_refused_and_told_whom_to_ask(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(RunFolderError, match=rf"in use by process {os.getpid()} of .* on .*remove .*{LOCK}"):
            RunLock(tmp_path).__enter__()
    assert not (tmp_path / LOCK).exists()
    with RunLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_gives_its_folder_back(tmp_path):
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_process_that_ended_is_taken_over_at_once(tmp_path, dead_process):
    said = []
    hold(tmp_path, token="other", process={"pid": dead_process})
    with RunLock(tmp_path, said.append) as lock:
        assert read_owner(tmp_path / LOCK) == lock.owner
    assert len(said) == 1 and "took over" in said[0] and str(dead_process) in said[0]


def test_a_process_id_used_again_is_not_taken_for_the_owner(tmp_path):
    hold(tmp_path, token="other", process={"started": "1"})
    with RunLock(tmp_path, lambda text: None) as lock:
        assert read_owner(tmp_path / LOCK) == lock.owner


def test_a_restarted_job_takes_over_from_its_earlier_attempt(tmp_path, monkeypatch):
    hold(tmp_path, token="other", process={"host": "lost-node"}, job="7", attempt=0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path, lambda text: None) as lock:
        assert lock.owner.attempt == 1


@pytest.mark.parametrize("content", [None, "", '{"pid": 1}'], ids=["another host", "empty", "damaged"])
def test_a_lock_that_nobody_renews_is_taken_over_in_time(tmp_path, monkeypatch, content):
    monkeypatch.setattr(run_lock, "PATIENCE_S", 2.0)
    hold(tmp_path, token="other", process={"host": "elsewhere"})
    if content is not None:
        (tmp_path / LOCK).write_text(content)
    said = []
    with RunLock(tmp_path, said.append):
        pass
    assert ["watching" in said[0], "took over" in said[1]] == [True, True]


def test_a_lock_that_another_host_renews_is_respected(tmp_path, monkeypatch):
    owner = hold(tmp_path, token="other", process={"host": "elsewhere"})
    lock = tmp_path / LOCK
    monkeypatch.setattr(run_lock.time, "sleep", lambda _: lock.write_text(json.dumps(asdict(replace(owner, beat=1)))))
    with pytest.raises(RunFolderError, match="on elsewhere"):
        RunLock(tmp_path, lambda text: None).__enter__()
    assert read_owner(lock).process.host == "elsewhere"


def test_a_run_whose_folder_was_taken_ends_without_a_save(tmp_path):
    program = f"""
import json, time
from dataclasses import asdict, replace
from pathlib import Path
from megatron_hybrid.train import run_lock
run_lock.BEAT_S = 0.1
with run_lock.RunLock(Path({str(tmp_path)!r})) as lock:
    time.sleep(0.5)
    lock.path.write_text(json.dumps(asdict(replace(lock.owner, token="other", user="somebody"))))
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 78 and "was taken over by process" in done.stderr and "somebody" in done.stderr
