"""NVIDIA's Multi-Process Service, with which kernels of several runs share a GPU at the same time. Without it, runs take turns.

https://docs.nvidia.com/deploy/mps/index.html
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_hybrid.base.errors import UserError

DAEMON = "nvidia-cuda-mps-control"
TIMEOUT_S = 30


@contextmanager
def multi_process_service(wanted: bool) -> Iterator[dict[str, str]]:
    """Run the service, for this process's runs alone. Its folders are temporary, so that it meets no other service of the machine.

    Yields:
        The variables with which a run uses the service. They are empty if it is not wanted. A run of the service counts the GPUs
        from 0 that CUDA_VISIBLE_DEVICES of this process names.

    Raises:
        UserError: the service is not installed, or does not start.
    """
    if not wanted:
        yield {}
        return
    daemon = shutil.which(DAEMON)
    if daemon is None:
        raise UserError(f"--mps: {DAEMON} is not on PATH; it comes with NVIDIA's driver. Without --mps runs take turns")
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in variables.values():
            os.mkdir(path)
        environment = os.environ | variables
        # the daemon keeps a pipe open, so that waiting for the end of its output would never end
        status = subprocess.run(
            [daemon, "-d"], env=environment, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL
        ).returncode
        if status:
            raise UserError(f"--mps: {DAEMON} -d ended with status {status}; leave --mps out, and runs take turns")
        try:
            yield variables
        finally:
            subprocess.run([daemon], input="quit\n", text=True, env=environment, timeout=TIMEOUT_S)
