"""Device of a rank: CUDA with NCCL, or CPU with gloo and the same code (distributed/cpu_backend.py)."""

import os
import socket
from typing import Any

import torch

from megatron_hybrid.base.errors import LaunchError
from megatron_hybrid.distributed.cpu_backend import CPU, use_cpu_backend


def has_cuda() -> bool:
    """Return True if this process computes on a GPU. An empty CUDA_VISIBLE_DEVICES hides all GPUs."""
    return torch.cuda.is_available()


def local_device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else CPU


def synchronize() -> None:
    """Wait until this rank's device has finished all its work."""
    if has_cuda():
        torch.cuda.synchronize()


def communication_backend() -> str:
    """Return torch.distributed's backend for this device."""
    return "nccl" if has_cuda() else "gloo"


def setup_device(local_rank: int) -> str:
    """Select this process's device and make megatron-core run on it.

    Returns:
        A line that names the device and the reason.

    Raises:
        LaunchError: more ranks on this node than GPUs.
    """
    # megatron-core and Transformer Engine overlap communication with GEMMs by the order of launches
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_cuda():
        count = torch.cuda.device_count()
        device = device_index(local_rank, count)
        torch.cuda.set_device(device)
        return f"device: CUDA over NCCL ({torch.cuda.get_device_name()}, {count} visible on this node)"
    use_cpu_backend()
    return f"device: CPU over gloo, {torch.get_num_threads()} threads per rank (no CUDA device is visible)"


def device_index(local_rank: int, visible: int) -> int:
    """Return the index of a rank's GPU among the visible ones.

    A single visible GPU means that the launcher has bound it to the rank (srun --gpus-per-task=1, --gpu-bind). launch/start.py
    checks that no other rank has the same GPU.

    Raises:
        LaunchError: several GPUs are visible, and fewer than the node has ranks.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        words = f"{visible} visible" + (f" (CUDA_VISIBLE_DEVICES={named})" if named is not None else "")
        raise LaunchError(
            f"local rank {local_rank} has no GPU: {words}; start at most {visible} ranks on this node, or give each rank its own GPU "
            "(srun --gpus-per-task=1)"
        )
    return local_rank


def device_identity() -> str:
    """Return a unique name of this rank's GPU or MIG instance."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    mig = named if named.startswith("MIG-") else ""  # the instances of a GPU share its UUID
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid} {mig}"


def node_name() -> str:
    """Return this node's name in SLURM, or its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def parameter_device(config: Any) -> torch.device | int:
    """Return the device on which megatron-core's linears create their parameters."""
    return CPU if config.use_cpu_initialization else torch.cuda.current_device()
