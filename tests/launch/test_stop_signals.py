"""Requests to stop, where the main thread is inside a C function that no Python handler can interrupt."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

PROLOGUE = """
import ctypes, os, sys, time
from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.launch import stop_signals
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
heartbeat.beat("waiting for all 2 ranks to join at here:1")
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


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda x: str(int(x)))
def test_before_the_first_step_the_process_ends_and_says_so(rank, signum):
    process = rank(WAIT_IN_A_LOCK)
    sent = time.monotonic()
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and time.monotonic() - sent < 20
    what = (
        "while waiting for all 2 ranks to join at here:1: there was nothing to save, and nothing is lost; run the same"
    )
    assert f"rank: asked to stop by {signum.name} {what}" in errors and "Traceback" not in errors


TRAINING = """
watcher.saved_step = lambda: 3
heartbeat.begin_step(4)
heartbeat.end_step(5)
"""


def test_further_signals_do_not_lose_the_save(rank):
    process = rank(TRAINING + WAIT_IN_A_LOCK)
    process.send_signal(signal.SIGINT)
    assert "asked to stop by Ctrl-C: saving after this step; to end without saving" in process.stderr.readline()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(signum)
        time.sleep(0.3)
    assert process.poll() is None, "the step is waited for"


def test_sigquit_prints_stacks_and_ends_nothing(rank):
    process = rank(TRAINING + WAIT_IN_A_LOCK)
    process.send_signal(signal.SIGQUIT)
    while "rank.py" not in process.stderr.readline():
        pass
    assert process.poll() is None


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""


def test_a_rank_stops_when_torchrun_has_ended(root, tmp_path):
    """Also if the main thread is in C++: before the first step, the watcher ends the process."""
    (tmp_path / "rank.py").write_text(PROLOGUE + WAIT_IN_A_LOCK)
    env = os.environ | {"TORCHELASTIC_RUN_ID": "none", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PARENT, str(tmp_path / "rank.py")]
    parent = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = {parent.stdout.readline(), parent.stdout.readline()}
    pid = int(next(line for line in lines if line != "waiting\n"))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid)
    assert "torchrun has ended without its ranks: stopping" in parent.stderr.read()


def test_a_step_that_hangs_after_a_request_ends_the_process(rank):
    process = rank(TRAINING + "stop_signals.PATIENCE_S = 0.5\nheartbeat.begin_step(5)\n" + WAIT_IN_A_LOCK)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "asked to stop by SIGTERM, and step 6 has not ended within" in errors and "resumes from step 3" in errors


@pytest.mark.parametrize("asked", ["time.sleep(60)", "raise OSError(116, 'Stale file handle')"], ids=["hangs", "fails"])
def test_a_file_system_that_does_not_answer_keeps_no_process_alive(rank, asked):
    program = f"def ask(): {asked}\nwatcher.saved_step = ask\nheartbeat.begin_step(4)\nheartbeat.end_step(5)\n"
    process = rank(program + "stop_signals.PATIENCE_S = 0.5\nheartbeat.begin_step(5)\n" + WAIT_IN_A_LOCK)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "steps after the last checkpoint are lost; the same command resumes from it" in errors


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
def test_the_launcher_forwards_ctrl_c_as_often_as_it_comes(rank):
    first = rank(WAIT_IN_A_LOCK, *LAUNCH, ranks=2)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 75 and errors.count("asked to stop by SIGUSR1") == 1, errors
    second = rank(TRAINING + WAIT_IN_A_LOCK, *LAUNCH, ranks=2)
    for _ in range(3):
        second.send_signal(signal.SIGINT)
        time.sleep(0.7)
    assert second.poll() is None, "the ranks save first"


SIGNAL_AT_EXIT = """
import os, signal, sys
from megatron_hybrid.launch.stop_signals import unblock_stop_signals

class SignalsItself:
    kill, pid, number = staticmethod(os.kill), os.getpid(), int(sys.argv[1])

    def __del__(self):
        self.kill(self.pid, self.number)

for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda *_: None)
unblock_stop_signals()
module = SignalsItself()  # deleted with the module, when Python has given up its handlers
sys.exit(75)
"""


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_process_exits_keeps_its_status(signum):
    done = subprocess.run([sys.executable, "-c", SIGNAL_AT_EXIT, str(int(signum))], capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
