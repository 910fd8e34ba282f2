"""Form and leave the tensor, context, data and pipeline parallel groups."""

from typing import Protocol
from weakref import WeakSet

import torch
import torch.distributed as dist

from megatron_hybrid.distributed.quiet import silence_known_warnings

silence_known_warnings()  # importing megatron-core, below, warns

# ruff: noqa: E402
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.config.parallel import ParallelConfig

__all__ = [
    "LONGEST_WAIT_MINUTES",
    "ProcessGroupCollection",
    "form_groups",
    "leave_groups",
    "release_before_leaving",
    "stop_distributed",
]

LONGEST_WAIT_MINUTES = 30
"""Minutes after which a collective that waits for a missing rank ends the run."""


class HoldsCommunicators(Protocol):
    """Keeps communicators of groups in use, as CUDA graphs of collectives do. NCCL waits for those to end before it destroys one."""

    def release(self) -> None:
        """Let them go. Called when groups are about to be destroyed; may be called twice."""


_holders: WeakSet[HoldsCommunicators] = WeakSet()


def release_before_leaving(holder: HoldsCommunicators) -> None:
    """Release an object before groups are destroyed, also after an error. Without it, destroying them would wait forever."""
    _holders.add(holder)


def _release() -> None:
    for holder in list(_holders):
        holder.release()
    _holders.clear()


def form_groups(
    parallel: ParallelConfig, seed: int, timeout_minutes: float = LONGEST_WAIT_MINUTES
) -> ProcessGroupCollection:
    """Form the parallel groups and seed this rank's random generators.

    Ranks are numbered tensor parallel first, then context, data, pipeline (megatron-core's `tp-cp-ep-dp-pp`), so that the
    groups with the most communication stay inside a node.
    """
    virtual = parallel.virtual_pipeline_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def leave_groups() -> None:
    """Destroy all groups except the group of all ranks, so that `start_distributed` can form others. Every rank calls it.

    megatron-core only forgets its groups; this also frees their communicators and NCCL's memory.
    """
    _release()
    parallel_state.destroy_model_parallel()
    in_order = list(dist.distributed_c10d._world.pg_map)  # in the order of creation, which is the same on all ranks
    for group in in_order:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def stop_distributed() -> None:
    """Destroy the process groups. A second call has no effect."""
    if dist.is_initialized():
        _release()
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
