"""Ranks of tools/pretrain.py that a campaign starts, disturbs and watches: forked from this process, or started by a launcher."""

import ctypes
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from testing import ranks

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "pretrain.py"
LAUNCHERS = {
    "launch": [sys.executable, "tools/launch.py", "--cpu-ranks"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"],
}


def preload() -> None:
    """Import what a rank imports, so that a forked rank starts at once."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ranks.preload()


class Forked:
    """Ranks forked off this process.

    Args:
        hook: called with the rank in each child, before the script runs.
    """

    def __init__(self, arguments: list[str], ranks: int, log: Path, hook: Callable[[int], None] | None = None) -> None:
        self.log, self.codes, self.ended = log, dict[int, int](), dict[int, float]()
        log.write_text("")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        sys.stdout.flush()
        self.pids = [_fork(arguments, rank, ranks, port, log, hook) for rank in range(ranks)]

    def poll(self) -> dict[int, int]:
        """Collect the statuses of ranks that have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank], self.ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        return self.codes

    def wait(self, timeout: float, grace: float | None = None) -> list[int | None]:
        """Return the statuses; None: killed. With `grace`, the others are killed so long after the first failure."""
        deadline = time.monotonic() + timeout
        while len(self.poll()) < len(self.pids) and time.monotonic() < deadline:
            if grace is not None and any(self.codes.values()):
                deadline, grace = min(deadline, time.monotonic() + grace), None
            time.sleep(0.01)
        left = [rank for rank in range(len(self.pids)) if rank not in self.codes]
        for rank in left:
            os.kill(self.pids[rank], signal.SIGKILL)
        while len(self.poll()) < len(self.pids):
            time.sleep(0.005)
        return [None if rank in left else self.codes[rank] for rank in range(len(self.pids))]

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def _fork(arguments: list[str], rank: int, ranks: int, port: int, log: Path, hook: Callable[[int], None] | None) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the campaign
        output = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_PORT=port)
        os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
        sys.argv = [str(SCRIPT), *arguments]
        if hook:
            hook(rank)
        code = _main()
        threading._shutdown()  # type: ignore[attr-defined] # as the interpreter does at its end
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def _main() -> int:
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
        return 1
    return 0


class Launched:
    """A run under a launcher, in a session of its own. Its ranks are found by a variable in their environment."""

    def __init__(self, launcher: str, arguments: list[str], ranks: int, log: Path, **variables: str) -> None:
        self.log, self.tag = log, f"{random.SystemRandom().getrandbits(64):x}"
        self.process = subprocess.Popen(
            [*LAUNCHERS[launcher], str(ranks), str(SCRIPT), *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "FAULTS_TAG": self.tag} | variables,
        )

    def ranks(self) -> dict[int, int]:
        """Return the process IDs of living ranks."""
        found = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                pairs = Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
                env = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
                command = Path(f"/proc/{entry}/cmdline").read_bytes()
                zombie = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            is_rank = b"launch.py" not in command and b"distributed.run" not in command and b"RANK" in env
            if env.get(b"FAULTS_TAG") == self.tag.encode() and is_rank and not zombie:
                found.setdefault(int(env[b"RANK"]), int(entry))
        return found

    def wait(self, timeout: float) -> int | None:
        """Return the launcher's status; None: it has not ended."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> int:
        """Kill what is left, and return the number of ranks that were."""
        left = self.ranks()
        for pid in {*left.values(), *([self.process.pid] if self.process.poll() is None else [])}:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return len(left)

    def text(self) -> str:
        return self.log.read_text(errors="replace")
