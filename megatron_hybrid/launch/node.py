"""Launcher of a node: start the node's ranks, forward signals to them, and exit with their status. No torch here.

Unlike torchrun, it keeps the ranks' exit status (75 requests a requeue, 78 means wrong input). It forwards SIGUSR1, SIGTERM and
Ctrl-C as often as they come instead of killing the ranks, and waits until they have saved. It can restart the ranks of a single node.
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
from megatron_hybrid.launch.stop_signals import asks_to_stop, unblock_stop_signals
from megatron_hybrid.launch.variables import LAUNCH_RESTARTS

GRACE_S = 5.0
"""Seconds that ranks of all nodes have to end by themselves, and to report the reason, after one of them has failed."""
GRACE_AFTER_REQUEUE_S = 2.0
"""The same after a rank that requests a requeue: all ranks end at the same time then, except those that hang."""
STACKS_S = 1.0
"""Seconds that ranks have to print their stacks before they are killed."""
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


class Requests:
    """Signals that this launcher has received.

    Attributes:
        asked: True once the run was asked to stop.
        forward: True while a request has not been forwarded to the ranks.
        failed_elsewhere: True once another node's launcher has reported a failure.
    """

    def __init__(self) -> None:
        self.asked = self.forward = self.failed_elsewhere = False
        for signum in (*asks_to_stop(), signal.SIGUSR2):
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGUSR2:
            self.failed_elsewhere = True
        else:
            self.asked = self.forward = True


class Node:
    """Ranks of this node.

    Args:
        command: command of every rank. Ranks get RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as with torchrun.
        node: launch of this launcher; its rank is the node's number.
        restarts: number of times that this launcher has restarted the ranks.
    """

    def __init__(self, command: Sequence[str], ranks: int, node: Launch, requests: Requests, restarts: int = 0) -> None:
        self.node, self.requests = node, requests
        host, port = node.master or ("127.0.0.1", free_port())
        common = {
            "WORLD_SIZE": ranks * node.world_size,
            "LOCAL_WORLD_SIZE": ranks,
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            LAUNCH_RESTARTS: restarts,
        }
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

    def _forward(self) -> None:
        """Ask the ranks to save. SIGUSR1 has the same effect as SIGTERM, and stays pending in ranks without a handler."""
        self.requests.forward = False
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGUSR1)

    def wait(self) -> int:
        """Wait for the ranks and return the status of the first that failed (128 + n for signal n), or 0.

        If a rank fails, all other ranks on all nodes are ended, because they would wait for it forever.
        """
        codes = [rank.poll() for rank in self._ranks]
        while None in codes and not any(codes) and not self.requests.failed_elsewhere:
            if self.requests.forward:
                self._forward()
            time.sleep(POLL_S)
            codes = [rank.poll() for rank in self._ranks]
        requeue = REQUEUE in codes
        deadline = time.monotonic() + (GRACE_AFTER_REQUEUE_S if requeue and not self.requests.asked else GRACE_S)
        if None in codes:
            self._end_others(deadline, stacks=not requeue)
            later = [rank.returncode for rank in self._ranks]
            # a rank that reports a hang kills the one that hangs
            codes = later if not any(codes) or REQUEUE in later else codes
        failed = [local for local, code in enumerate(codes) if code]
        if not failed:
            return 0
        first = next((local for local in failed if codes[local] in QUIET), failed[0])
        return self._status(first, codes[first] or 0, deadline)

    def _end_others(self, deadline: float, stacks: bool) -> None:
        """Wait for the ranks until the deadline, then make those that are left print their stacks, and kill them."""
        while any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        left = [rank for rank in self._ranks if rank.poll() is None]
        if left and stacks:
            print(
                f"launch: {len(left)} ranks have not ended and are killed; their stacks:", file=sys.stderr, flush=True
            )
            for rank in left:
                rank.send_signal(signal.SIGQUIT)
            time.sleep(STACKS_S)
        for rank in left:
            rank.kill()
        for rank in self._ranks:
            rank.wait()

    def _status(self, local: int, code: int, deadline: float) -> int:
        """Report a failure, and return the launcher's exit status."""
        if self.requests.failed_elsewhere:  # srun returns the largest status of all nodes
            return code if code > 0 else 1
        if code not in QUIET:
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"status {code}"
            rank = self.node.rank * len(self._ranks) + local
            print(f"launch: rank {rank} on {os.uname().nodename} ended with {how}", file=sys.stderr, flush=True)
        if code != REQUEUE or not self.requests.asked:  # when asked to stop, all ranks end after all of them have saved
            signal_other_nodes(self.node, deadline)
        if code == -signal.SIGKILL:
            print(
                f"launch: it was killed from outside, for lack of memory for example: status {REQUEUE} asks to resume",
                file=sys.stderr,
                flush=True,
            )
            return REQUEUE
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


def run_node(
    command: Sequence[str], cpu_ranks: int | None = None, gpus: int | None = None, max_restarts: int = 0
) -> int:
    """Start `command` on this node's ranks, wait for them and return the exit status.

    Args:
        max_restarts: number of times to start the ranks again after a failure or a hang. Ranks that make no progress between restarts
            end with BAD_INPUT (train/interrupt.py), after which there is no further restart.

    Raises:
        LaunchError: no GPU, fewer GPUs than requested, a contradictory environment, or restarts on several nodes.
    """
    for signum in asks_to_stop():
        signal.signal(signum, _stop_before_start)
    unblock_stop_signals()
    node = node_from_environment()
    if max_restarts and node.world_size > 1:
        raise LaunchError(
            f"--max-restarts {max_restarts}: this launcher restarts the ranks of a single node, and there are {node.world_size}; "
            "requeue the job on status 75 (examples/pretrain_hybrid_7b.sh), or start with torchrun --max-restarts or ft_launcher"
        )
    try:
        ranks = ranks_of_node(cpu_ranks, gpus)
        check_ranks(node, ranks)
    except LaunchError:
        signal_other_nodes(node, time.monotonic() + GRACE_S)
        raise
    requests = Requests()
    for restarts in range(max_restarts + 1):
        status = Node(command, ranks, node, requests, restarts).wait()
        if status in (0, BAD_INPUT, INTERRUPTED) or requests.asked:
            break
        if restarts < max_restarts:
            text = f"launch: status {status}: restarting the ranks ({restarts + 1} of at most {max_restarts} times)"
            print(text, file=sys.stderr, flush=True)
    return status


def _stop_before_start(signum: int, frame: FrameType | None) -> None:
    print(f"launch: asked to stop by {signal.Signals(signum).name} before the ranks were started", file=sys.stderr)
    sys.exit(REQUEUE)
