"""Runs of tools/pretrain.py whose ranks are forked from this process, with faults of the file system (shim.c).

A fork has imported torch and the project, so that a run of a few steps takes about a second. `with_shim` restarts the program with the
shim loaded. A fault is armed in one rank, just before the program starts, and hits calls on paths that contain `checkpoints`.
"""

import ctypes
import hashlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from testing.ranks import preload as preload_run

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).with_name("shim.c")
COUNT, KILL, FAIL = 0, 1, 2


@dataclass(frozen=True)
class Fault:
    """A fault of one rank: killed at the n-th call that changes a checkpoint, or failing from then on with an error number."""

    mode: int
    at: int
    number: int = 0
    rank: int = 0


def with_shim(folder: Path) -> None:
    """Compile the shim and restart this program with it, unless it is loaded. Children of ranks do not load it."""
    library = folder / f"shim-{hashlib.sha256(SHIM.read_bytes()).hexdigest()[:12]}.so"
    if not library.exists():
        subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SHIM), "-ldl"], check=True)
    if os.environ.get("LD_PRELOAD") != str(library):
        os.environ["LD_PRELOAD"] = str(library)
        os.execv(sys.executable, sys.orig_argv)
    del os.environ["LD_PRELOAD"]


def arm(fault: Fault, text: str = "checkpoints") -> None:
    """Arm a fault in this process."""
    library = ctypes.CDLL(None)
    library.faults_arm(text.encode(), fault.mode, ctypes.c_long(fault.at), fault.number)


def seen() -> int:
    """Return the number of calls since a fault was armed in this process."""
    library = ctypes.CDLL(None)
    library.faults_seen.restype = ctypes.c_long
    return int(library.faults_seen())


def preload() -> None:
    """Import what ranks import."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    preload_run()


@dataclass
class Outcome:
    """Exit statuses by rank (negative: signal; None: had to be killed), output, seconds, and calls that the shim counted."""

    codes: list[int | None]
    text: str
    seconds: float
    calls: int


def run(
    arguments: list[str], folder: Path, ranks: int = 1, fault: Fault | None = None, timeout: float = 120
) -> Outcome:
    """Run tools/pretrain.py on forked ranks and wait for them. Once one has failed, the others have 30 s to end."""
    log, counted = folder / "log.txt", folder / "calls.txt"
    log.write_text("")
    counted.write_text("0")
    port, begin = _free_port(), time.monotonic()
    sys.stdout.flush()
    pids = [_fork(arguments, rank, ranks, port, log, counted, fault) for rank in range(ranks)]
    codes: dict[int, int | None] = {}
    deadline = begin + timeout
    while len(codes) < ranks and time.monotonic() < deadline:
        for rank, pid in enumerate(pids):
            if rank not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(found[1])
                if codes[rank]:
                    deadline = min(deadline, time.monotonic() + 30)
        time.sleep(0.01)
    for rank, pid in enumerate(pids):
        if rank not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    seconds = time.monotonic() - begin
    return Outcome(
        [codes.get(rank) for rank in range(ranks)], log.read_text(errors="replace"), seconds, int(counted.read_text())
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork(arguments: list[str], rank: int, ranks: int, port: int, log: Path, counted: Path, fault: Fault | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
        sys.argv = ["pretrain", *arguments]
        if fault and fault.rank == rank:
            arm(fault)
        code = _main()
        threading._shutdown()  # type: ignore[attr-defined] # as the interpreter does at its end
        if fault and fault.rank == rank:
            arm_count = seen()
            arm(Fault(COUNT, 0), text="\n")
            counted.write_text(str(arm_count))
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def _main() -> int:
    try:
        runpy.run_path(str(ROOT / "tools/pretrain.py"), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1
    return 0
