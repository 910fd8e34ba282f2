"""A run folder belongs to one run: who gets it, who is refused, and when a lock is taken over."""

import json
import os
import subprocess
import sys
import textwrap
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


def test_a_lock_that_cannot_be_read_is_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.0)
    (tmp_path / LOCK).mkdir()
    with pytest.raises(RunFolderError, match=rf"run_dir: .*{LOCK} cannot be read or written: Is a directory; check"):
        RunLock(tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def hold_in_a_process(folder, work: str) -> subprocess.CompletedProcess:
    """Run a process that holds a folder, renews its lock every 0.1 s, and meanwhile does `work`."""
    program = f"""
import json, os, time
from dataclasses import asdict, replace
from pathlib import Path
from megatron_hybrid.train import run_lock
from megatron_hybrid.train.run_lock import read_owner
run_lock.BEAT_S = 0.1
with run_lock.RunLock(Path({str(folder)!r})) as lock:
{textwrap.indent(work, "    ")}
print("ended by itself")
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)


def test_a_run_whose_folder_was_taken_ends_without_a_save(tmp_path):
    work = """
other = lock.path.with_name("other")
while True:
    other.write_text(json.dumps(asdict(replace(lock.owner, token="other", user="somebody"))))
    os.replace(other, lock.path)
    time.sleep(0.5)
"""
    done = hold_in_a_process(tmp_path, work)
    assert done.returncode == 78 and "was taken over by process" in done.stderr and "somebody" in done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        "lock.path.unlink()",
        "lock.path.write_text('')",
        "lock.path.write_text('{')",
        "os.symlink(lock.path, loop); os.replace(loop, lock.path); time.sleep(0.5); lock.path.unlink()",
    ],
    ids=["missing", "empty", "damaged", "unreadable for a while"],
)
def test_a_run_outlives_damage_to_its_lock(tmp_path, damage):
    work = f"""
loop = lock.path.with_name("loop")
for _ in range(3):
    {damage}
    while not lock.path.is_file() or read_owner(lock.path) is None:
        time.sleep(0.01)
    assert read_owner(lock.path).token == lock.owner.token
"""
    done = hold_in_a_process(tmp_path, work)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended by itself\n", "")
    assert not list(tmp_path.iterdir())
