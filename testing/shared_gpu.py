"""Launches of several ranks on one GPU.

NCCL refuses two ranks of one host on one GPU. Here each rank is a host of its own for NCCL (NCCL_HOSTID), with one GPU, and they talk
through sockets, as nodes do. Their kernels run at the same time with NVIDIA's Multi-Process Service, and in turn without it.
"""

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from examples.multi_process_service import DAEMON, multi_process_service
from megatron_hybrid.launch.environment import free_port

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.1


def service() -> AbstractContextManager[dict[str, str]]:
    """Run NVIDIA's Multi-Process Service, if it is installed. Yields the variables with which a process uses it."""
    return multi_process_service(shutil.which(DAEMON) is not None)


def host(number: int) -> dict[str, str]:
    """Return the variables with which NCCL takes a process for one of another host."""
    return {"NCCL_HOSTID": f"host-{number}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables of a rank, which is the only one of its node."""
    found = dict(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return {name: str(value) for name, value in found.items()} | host(rank)


def run_ranks(
    command: Sequence[str], ranks: int, environment: Mapping[str, str], folder: Path, timeout_s: float
) -> tuple[int, str]:
    """Run a command as that many ranks on the first visible GPU, as `run_together` does."""
    port = free_port()
    with service() as mps:
        environments = [{**environment, **mps, **variables(rank, ranks, port)} for rank in range(ranks)]
        return run_together(command, environments, folder, timeout_s)


def run_together(
    command: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path, timeout_s: float
) -> tuple[int, str]:
    """Run a command once in each environment, at the same time, and end all processes as soon as one fails.

    Args:
        folder: where the processes' output goes.

    Returns:
        The status of the first process that fails (0: none, -1: they took too long), and the end of every process's output.
    """
    files = [folder / f"process-{number}.log" for number in range(len(environments))]
    processes = []
    for environment, file in zip(environments, files, strict=True):
        with file.open("w") as said:
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
            )
    status = _wait(processes, time.monotonic() + timeout_s)
    return status, "\n".join(f"{file.stem}:\n{file.read_text()[-3000:]}" for file in files)


def _wait(processes: Sequence[subprocess.Popen], end: float) -> int:
    """Wait for all processes or the first failure, and kill those that are left. Return the status, -1 after `end`."""
    try:
        while True:
            states = [process.poll() for process in processes]
            if failed := [status for status in states if status]:
                return failed[0]
            if None not in states:
                return 0
            if time.monotonic() > end:
                return -1
            time.sleep(POLL_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()
