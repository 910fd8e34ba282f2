"""One launcher a node, started as users start it, with ranks that take a moment instead of torch."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megatron_hybrid.launch.environment import LaunchError
from megatron_hybrid.launch.node import ranks_of_node, visible_gpus

PROLOGUE = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def say(line): os.write(1, f"{line}\\n".encode())  # whole, also if others write
"""


@pytest.fixture
def launch(root, tmp_path):
    """`launch(program, ranks)`: tools/launch.py with a Python program of our own, started."""
    started = []

    def start(program: str, ranks: int = 2, **variables: str) -> subprocess.Popen:
        script = tmp_path / "rank.py"
        script.write_text(PROLOGUE + program)
        command = [sys.executable, "tools/launch.py", "--cpu-ranks", str(ranks), str(script), "--an", "argument"]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))} | variables
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, cwd=root, env=env, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_ranks_find_what_torchrun_would_tell_them(launch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
    process = launch(f"say(' '.join([os.environ[name] for name in {names}] + sys.argv[1:]))", 3)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert sorted(output.splitlines()) == [f"{rank} {rank} 3 3 127.0.0.1  --an argument" for rank in range(3)]


def test_the_ranks_of_two_nodes_of_a_job_controller(launch):
    """RANK and WORLD_SIZE are each node's: its ranks are numbered over all nodes, and all meet at the same place."""
    program = "say(' '.join(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"
    pod = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456"}
    for number in range(2):
        process = launch(program, 2, RANK=str(number), **pod)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        expected = [f"{2 * number + local} {local} 4 localhost 23456" for local in range(2)]
        assert sorted(output.splitlines()) == expected


def test_every_node_says_what_is_wrong_with_it(launch):
    process = launch("", 2, RANK="1", WORLD_SIZE="2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 78 and "set MASTER_ADDR to the host of node 0" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        ("sys.exit(3)", 3, "launch: rank 1 on .* ended with status 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, r"ended with signal 11 \(SIGSEGV\)"),
        ("sys.exit(75)", 75, ""),
        ("sys.exit(78)", 78, ""),
    ],
)
def test_the_first_failure_ends_all_and_gives_the_status(launch, end, status, says):
    # rank 0 outlasts the launcher's patience in one of the cases
    process = launch(f"if rank == 1: {end}\ntime.sleep(20 if {status} == 3 else 0.5)\nsay(f'end of {{rank}}')")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert re.search(says, errors) if says else "launch:" not in errors
    assert ("end of 0" in output) == (status != 3), "those that end in time do so by themselves"


@pytest.mark.parametrize("asked", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_reach_ranks_even_before_they_listen(launch, asked):
    """As a rank that still imports torch when the signal comes: it is told once it listens."""
    program = """
say("started")
time.sleep(1.5)
got = []
signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
deadline = time.monotonic() + 20
while not got and time.monotonic() < deadline: time.sleep(0.05)
sys.exit(75 if got else 1)
"""
    process = launch(program)
    assert process.stdout.readline() == "started\n" and process.stdout.readline() == "started\n"
    process.send_signal(asked)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors


def test_ranks_do_not_outlive_a_launcher_that_is_killed(launch):
    process = launch("say(os.getpid())\ntime.sleep(60)")
    ranks = [int(process.stdout.readline()) for _ in range(2)]
    process.kill()
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(psutil.pid_exists, ranks))


def test_how_many_ranks(tmp_path):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0,3"}) == 2 and visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert ranks_of_node(3, None, {"CUDA_VISIBLE_DEVICES": "0"}) == 3
    assert ranks_of_node(None, None, {"CUDA_VISIBLE_DEVICES": "0,1"}) == 2
    assert ranks_of_node(None, 1, {"CUDA_VISIBLE_DEVICES": "0,1"}) == 1
    with pytest.raises(LaunchError, match="no GPU is visible on .*CPU_RANKS=4"):
        ranks_of_node(None, None, {"CUDA_VISIBLE_DEVICES": ""})
    with pytest.raises(LaunchError, match="1 GPUs are visible on .*, and 8 are requested; exclude the node"):
        ranks_of_node(None, 8, {"CUDA_VISIBLE_DEVICES": "0"})


def test_gpus_are_counted_by_nvidia_smi(tmp_path, monkeypatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-2)'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert visible_gpus({}) == 2


FAILS_TWICE = """
from pathlib import Path
attempts = Path(os.environ["ATTEMPTS"])
before = int(os.environ["LAUNCH_RESTARTS"])
if rank == 0: attempts.write_text(attempts.read_text() + "x")
time.sleep(0.3)
sys.exit(75 if rank == 1 and before < 2 else 0)
"""


@pytest.mark.parametrize(("most", "status", "attempts"), [(0, 75, 1), (1, 75, 2), (5, 0, 3)])
def test_ranks_are_restarted(root, tmp_path, most, status, attempts):
    (tmp_path / "rank.py").write_text(PROLOGUE + FAILS_TWICE)
    (tmp_path / "attempts").write_text("")
    command = [sys.executable, "tools/launch.py", "--cpu-ranks", "2", *(["--max-restarts", str(most)] if most else [])]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
    env["ATTEMPTS"] = str(tmp_path / "attempts")
    done = subprocess.run([*command, str(tmp_path / "rank.py")], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert len((tmp_path / "attempts").read_text()) == attempts
    assert done.stderr.count("restarting the ranks") == attempts - 1


def test_wrong_input_is_not_restarted(launch, root, tmp_path):
    (tmp_path / "wrong.py").write_text("import sys; sys.exit(78)")
    command = [sys.executable, "tools/launch.py", "--cpu-ranks", "1", "--max-restarts", "3", str(tmp_path / "wrong.py")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 78 and "restarting" not in done.stderr


def test_a_killed_rank_asks_for_a_requeue_and_the_others_print_their_stacks(launch):
    process = launch("""
import faulthandler
faulthandler.register(signal.SIGQUIT)
if rank == 1: time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
""")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "rank 1 on" in errors and "ended with signal 9 (SIGKILL)" in errors and "asks to resume" in errors
    assert "rank.py" in errors, "the stack of rank 0"
