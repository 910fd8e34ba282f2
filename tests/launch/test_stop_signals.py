"""Requests to stop, where the main thread is inside a C function that no Python handler can interrupt."""

import os
import signal
import subprocess
import sys
import time

import pytest

PROLOGUE = """
import ctypes, os, sys, time
from megatron_hybrid.launch import stop_signals
stop_signals.REPEAT_S = 0.3
stop_signals.watch()
watcher = stop_signals.watcher
def say(line): os.write(1, f"{line}\\n".encode())
def wait_in_c():
    say("waiting")
    end = time.monotonic() + 60
    while time.monotonic() < end: ctypes.CDLL(None).usleep(60_000_000)  # a handled signal ends it early, and no Python runs
"""
WAIT_IN_A_LOCK = """
import threading
stop_signals.now_doing("waiting for all 2 ranks to join at here:1")
say("waiting")
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)  # for ever, and restarted after a signal: as a C++ wait for other ranks
"""


@pytest.fixture
def rank(root, tmp_path):
    """`rank(program, launcher=[])`: a program that has started to wait."""
    started = []

    def start(program: str, *before: str, ranks: int = 1, **options) -> subprocess.Popen:
        script = tmp_path / "rank.py"
        script.write_text(PROLOGUE + program)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK"))}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        env["PYTHONPATH"] = str(root)
        process = subprocess.Popen([sys.executable, *before, str(script)], cwd=root, env=env, **pipes, **options)
        started.append(process)
        for _ in range(ranks):
            assert process.stdout.readline() == "waiting\n", process.stderr.read()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)], ids=lambda x: str(int(x))
)
def test_before_the_first_step_the_process_ends_and_says_so(rank, signum, status):
    process = rank(WAIT_IN_A_LOCK)
    sent = time.monotonic()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and time.monotonic() - sent < 20
    what = (
        "while waiting for all 2 ranks to join at here:1: there was nothing to save, and nothing is lost; run the same"
    )
    assert f"rank: asked to stop by {signum.name} {what}" in errors and "Traceback" not in errors


TRAINING = """
watcher.saved_step = lambda: 3
watcher.begin_step(4)
watcher.end_step(5)
"""


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_lost(rank):
    process = rank(TRAINING + WAIT_IN_A_LOCK)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # the launcher's, right after the terminal's
    assert "asked to stop by Ctrl-C: saving after this step; a second Ctrl-C ends at once" in process.stderr.readline()
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "ended at once by a second Ctrl-C: 2 steps after step 3 are lost; the same command resumes" in errors


def test_sigterm_and_sigusr1_may_be_repeated(rank):
    process = rank(TRAINING + WAIT_IN_A_LOCK)
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(signum)
        time.sleep(0.4)
    assert process.poll() is None, "the step is waited for"


def test_a_step_that_hangs_after_a_request_ends_the_process(rank):
    process = rank(TRAINING + "stop_signals.PATIENCE_S = 0.5\nwatcher.begin_step(5)\n" + WAIT_IN_A_LOCK)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "asked to stop by SIGTERM, and step 6 has not ended within" in errors and "resumes from step 3" in errors


def test_a_background_job_of_a_script_goes_on_ignoring_ctrl_c(rank):
    process = rank(WAIT_IN_A_LOCK, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


LAUNCH = ("tools/launch.py", "--cpu-ranks", "2")


@pytest.mark.slow
def test_the_launcher_forwards_ctrl_c_and_the_second_ends_the_ranks(rank):
    first = rank(WAIT_IN_A_LOCK, *LAUNCH, ranks=2)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 75 and errors.count("asked to stop by SIGUSR1") == 1, errors
    second = rank(TRAINING + WAIT_IN_A_LOCK, *LAUNCH, ranks=2)
    second.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert second.poll() is None
    second.send_signal(signal.SIGINT)
    _, errors = second.communicate(timeout=60)  # returns when no rank holds the pipes any more
    assert (
        second.returncode == 130
        and "launch: ended by a second Ctrl-C; steps since the last checkpoint are lost" in errors
    )
