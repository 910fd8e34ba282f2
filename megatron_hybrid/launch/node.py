"""One launcher on each node: start the node's ranks, forward signals to them, and exit as they exit. No torch here.

Unlike torchrun it keeps the ranks' exit code (75 asks for a requeue, 78 means wrong input), forwards SIGUSR1 and SIGTERM
instead of ending the ranks, and gives them all the time they need to save. Ctrl-C asks them to save too; the second ends
them at once.
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
"""Time for ranks, here and on other nodes, to end by themselves, and to say why, once one of them has failed."""
POLL_S = 0.05
QUIET = (REQUEUE, BAD_INPUT, INTERRUPTED)
"""Statuses of ranks that have said why."""
_DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w/-]+", re.ASCII)
"""An entry of CUDA_VISIBLE_DEVICES: an index, or the identifier of a GPU or of a MIG instance."""


def visible_gpus(env: Mapping[str, str] = os.environ) -> int:
    """Count the GPUs that CUDA_VISIBLE_DEVICES names, else those that nvidia-smi lists; 0 where there is none.

    As for CUDA, entries from the first invalid one on are not visible: SLURM sets `NoDevFiles` where a job has no GPU.
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
    """Ranks to start here: as many as are asked for on CPU, else one a GPU.

    Raises:
        LaunchError: fewer GPUs are visible than this node should have, or none at all.
    """
    if cpu_ranks is not None:
        return cpu_ranks
    visible, host = visible_gpus(env), os.uname().nodename
    if visible == 0:
        raise LaunchError(f"no GPU is visible on {host}; for ranks on CPU say how many: --cpu-ranks 4, or CPU_RANKS=4")
    if gpus is not None and visible < gpus:
        raise LaunchError(
            f"{visible} GPUs are visible on {host}, where there should be {gpus}; take the node out, or set GPUS_PER_NODE"
        )
    return gpus or visible


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_the_launcher() -> None:
    """In a rank before its program starts: a launcher that is killed leaves no ranks behind on the GPUs."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Node:
    """The ranks of this node.

    Args:
        command: of every rank; they find RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as under torchrun.
        node: this launcher among the nodes' launchers; its rank is the node's number.
    """

    def __init__(self, command: Sequence[str], ranks: int, node: Launch):
        self.node = node
        self._stop = self._failed_elsewhere = self._at_once = False
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
        # Blocked until a rank has its own handler: one that is still importing torch keeps SIGUSR1 for later. SIGUSR2 is for
        # launchers alone, and SLURM signals the whole process group.
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
            self._at_once = True
        else:
            self._stop = True

    def _pass_on(self) -> None:
        """Ask the ranks to save. SIGUSR1 means the same to them as SIGTERM, and is kept where they have no handler yet."""
        self._stop = False
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGUSR1)

    def wait(self) -> int:
        """Wait for the ranks and return the status of the first that failed, 128 + n for a signal n; 0 when all did well.

        When one fails, the others of this node and of the other nodes are ended: they would wait for it for ever.
        """
        codes = [rank.poll() for rank in self._ranks]
        while None in codes and not any(codes) and not self._failed_elsewhere and not self._at_once:
            if self._stop:
                self._pass_on()
            time.sleep(POLL_S)
            codes = [rank.poll() for rank in self._ranks]
        if self._at_once:
            return self._end_at_once()
        deadline = time.monotonic() + GRACE_S
        if None in codes:
            self._end_the_rest(deadline)
            codes = codes if any(codes) else [rank.returncode for rank in self._ranks]
        failed = next((local for local, code in enumerate(codes) if code), None)
        return 0 if failed is None else self._status(failed, codes[failed] or 0, deadline)

    def _end_at_once(self) -> int:
        """After a second Ctrl-C. In a terminal the ranks have had it too, and say what is lost."""
        self._end_the_rest(time.monotonic() + 1.0)
        print("launch: ended by a second Ctrl-C; what was not saved is lost", file=sys.stderr, flush=True)
        return INTERRUPTED

    def _end_the_rest(self, deadline: float) -> None:
        while any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for rank in self._ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()

    def _status(self, local: int, code: int, deadline: float) -> int:
        if self._failed_elsewhere:  # that node tells its own status, and srun takes the largest
            return code if code > 0 else 1
        if code not in QUIET:
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"
            rank = self.node.rank * len(self._ranks) + local
            print(f"launch: rank {rank} on {os.uname().nodename} ended with {how}", file=sys.stderr, flush=True)
        if code != REQUEUE:  # with which all ranks end, and only when all have saved
            tell_other_nodes(self.node, deadline)
        return code if code > 0 else 128 - code


def tell_other_nodes(node: Launch, deadline: float) -> None:
    """Under srun: at the deadline the other launchers end those ranks that still wait for one that is gone.

    Not earlier: what is wrong here is mostly wrong there as well, and these launchers may only just be starting.
    """
    if node.world_size > 1 and node.launcher == "srun" and shutil.which("scancel"):
        time.sleep(max(0.0, deadline - time.monotonic()))
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
        subprocess.run(["scancel", "--signal=USR2", step], capture_output=True, timeout=60)


def run_node(command: Sequence[str], cpu_ranks: int | None = None, gpus: int | None = None) -> int:
    """Start `command` on this node's ranks and wait for them; the exit status.

    Raises:
        LaunchError: no GPU, fewer than there should be, or an environment that contradicts itself.
    """
    for signum in asks_to_stop():
        signal.signal(signum, _stop_before_the_ranks)
    node = node_from_environment()
    try:
        ranks = ranks_of_node(cpu_ranks, gpus)
        check_ranks(node, ranks)
    except LaunchError:
        tell_other_nodes(node, time.monotonic() + GRACE_S)
        raise
    return Node(command, ranks, node).wait()


def _stop_before_the_ranks(signum: int, frame: FrameType | None) -> None:
    print(f"launch: asked to stop by {signal.Signals(signum).name} before the ranks were started", file=sys.stderr)
    sys.exit(INTERRUPTED if signum == signal.SIGINT else REQUEUE)
