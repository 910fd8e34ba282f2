"""Launcher of a node: start the node's ranks, forward signals to them, and exit with their status. No torch here.

Unlike torchrun, it keeps the ranks' exit status (75 requests a requeue, 78 means wrong input). It forwards SIGUSR1 and SIGTERM
instead of killing the ranks, and waits until they have saved. Ctrl-C asks the ranks to save; a second Ctrl-C kills them.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from megatron_hybrid.base.errors import BAD_INPUT, INTERRUPTED, REQUEUE
from megatron_hybrid.launch.environment import Launch, LaunchError, free_port
from megatron_hybrid.launch.node_environment import check_ranks, node_from_environment
from megatron_hybrid.launch.stop_signals import REPEAT_S, asks_to_stop

GRACE_S = 5.0
"""Seconds that ranks of all nodes have to end by themselves, and to report the reason, after one of them has failed."""
POLL_S = 0.05
QUIET = (REQUEUE, BAD_INPUT, INTERRUPTED)
"""Statuses of ranks that have printed the reason."""
_DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w/-]+", re.ASCII)
"""An entry of CUDA_VISIBLE_DEVICES: an index, or the identifier of a GPU or of a MIG instance."""


def visible_gpus(env: Mapping[str, str] = os.environ) -> int:
    """Return the number of GPUs in CUDA_VISIBLE_DEVICES, or in nvidia-smi's list if it is not set.

    As in CUDA, entries from the first invalid one on are not visible. SLURM sets `NoDevFiles` for a job without GPUs.
    """
    if (named := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        devices = [device.strip() for device in named.split(",")]
        valid = [_DEVICE.fullmatch(device) is not None for device in devices]
        return len(devices) if all(valid) else valid.index(False)
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    return listing.stdout.count("GPU ") if listing.returncode == 0 else 0


def ranks_of_node(cpu_ranks: int | None, gpus: int | None, env: Mapping[str, str] = os.environ) -> int:
    """Return the number of ranks to start on this node: the requested CPU ranks, or one per GPU.

    Raises:
        LaunchError: fewer GPUs are visible than requested, or none.
    """
    if cpu_ranks is not None:
        return cpu_ranks
    visible, host = visible_gpus(env), os.uname().nodename
    if visible == 0:
        raise LaunchError(
            f"no GPU is visible on {host}; to run on CPU, set the number of ranks: --cpu-ranks 4, or CPU_RANKS=4"
        )
    if gpus is not None and visible < gpus:
        raise LaunchError(
            f"{visible} GPUs are visible on {host}, and {gpus} are requested; exclude the node, or set GPUS_PER_NODE"
        )
    return gpus or visible


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_the_launcher() -> None:
    """Make the kernel kill this rank when the launcher is killed, so that no ranks stay on the GPUs."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Node:
    """Ranks of this node.

    Args:
        command: command of every rank. Ranks get RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as with torchrun.
        node: launch of this launcher; its rank is the node's number.
    """

    def __init__(self, command: Sequence[str], ranks: int, node: Launch) -> None:
        self.node = node
        self._stop = self._failed_elsewhere = self._kill = False
        self._asked_at: float | None = None
        host, port = node.master or ("127.0.0.1", free_port())
        common = {
            "WORLD_SIZE": ranks * node.world_size,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
        for signum in (*asks_to_stop(), signal.SIGUSR2):
            signal.signal(signum, self._note)
        # A rank unblocks SIGUSR1 once it has a handler, so that a request during its imports is kept. SIGUSR2 is for launchers
        # only, but SLURM signals the whole process group.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
        self._ranks = [
            subprocess.Popen(
                command,
                preexec_fn=_die_with_the_launcher,
                env=os.environ
                | {k: str(v) for k, v in common.items()}
                | {"RANK": str(node.rank * ranks + local), "LOCAL_RANK": str(local)},
            )
            for local in range(ranks)
        ]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1, signal.SIGUSR2])

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGUSR2:  # from another node's launcher
            self._failed_elsewhere = True
            return
        now = time.monotonic()
        if self._asked_at is None:
            self._stop, self._asked_at = True, now
        elif signum == signal.SIGINT and now - self._asked_at > REPEAT_S:
            self._kill = True
        else:
            self._stop = True

    def _forward(self) -> None:
        """Ask the ranks to save. SIGUSR1 has the same effect as SIGTERM, and stays pending in ranks without a handler."""
        self._stop = False
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGUSR1)

    def wait(self) -> int:
        """Wait for the ranks and return the status of the first that failed (128 + n for signal n), or 0.

        If a rank fails, all other ranks on all nodes are ended, because they would wait for it forever.
        """
        codes = [rank.poll() for rank in self._ranks]
        while None in codes and not any(codes) and not self._failed_elsewhere and not self._kill:
            if self._stop:
                self._forward()
            time.sleep(POLL_S)
            codes = [rank.poll() for rank in self._ranks]
        if self._kill:
            return self._kill_ranks()
        deadline = time.monotonic() + GRACE_S
        if None in codes:
            self._end_others(deadline)
            codes = codes if any(codes) else [rank.returncode for rank in self._ranks]
        failed = next((local for local, code in enumerate(codes) if code), None)
        return 0 if failed is None else self._status(failed, codes[failed] or 0, deadline)

    def _kill_ranks(self) -> int:
        """End the ranks after a second Ctrl-C. In a terminal, the ranks receive it as well and report the lost steps."""
        self._end_others(time.monotonic() + 1.0)
        print("launch: ended by a second Ctrl-C; steps since the last checkpoint are lost", file=sys.stderr, flush=True)
        return INTERRUPTED

    def _end_others(self, deadline: float) -> None:
        while any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for rank in self._ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()

    def _status(self, local: int, code: int, deadline: float) -> int:
        if self._failed_elsewhere:  # srun returns the largest status of all nodes
            return code if code > 0 else 1
        if code not in QUIET:
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"
            rank = self.node.rank * len(self._ranks) + local
            print(f"launch: rank {rank} on {os.uname().nodename} ended with {how}", file=sys.stderr, flush=True)
        if code != REQUEUE:  # all ranks end with it, after all of them have saved
            signal_other_nodes(self.node, deadline)
        return code if code > 0 else 128 - code


def signal_other_nodes(node: Launch, deadline: float) -> None:
    """Make the other launchers of an srun step end their ranks at the deadline.

    Not earlier: other nodes mostly have the same problem and report it themselves, and their launchers may still be starting.
    """
    if node.world_size > 1 and node.launcher == "srun" and shutil.which("scancel"):
        time.sleep(max(0.0, deadline - time.monotonic()))
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
        subprocess.run(["scancel", "--signal=USR2", step], capture_output=True, timeout=60)


def run_node(command: Sequence[str], cpu_ranks: int | None = None, gpus: int | None = None) -> int:
    """Start `command` on this node's ranks, wait for them and return the exit status.

    Raises:
        LaunchError: no GPU, fewer GPUs than requested, or a contradictory environment.
    """
    for signum in asks_to_stop():
        signal.signal(signum, _stop_before_start)
    node = node_from_environment()
    try:
        ranks = ranks_of_node(cpu_ranks, gpus)
        check_ranks(node, ranks)
    except LaunchError:
        signal_other_nodes(node, time.monotonic() + GRACE_S)
        raise
    return Node(command, ranks, node).wait()


def _stop_before_start(signum: int, frame: FrameType | None) -> None:
    print(f"launch: asked to stop by {signal.Signals(signum).name} before the ranks were started", file=sys.stderr)
    sys.exit(INTERRUPTED if signum == signal.SIGINT else REQUEUE)
