"""Joining the other ranks: the device, torch.distributed, and the tensor, context, data and pipeline parallel groups."""

import datetime
import os

import torch
import torch.distributed as dist

from megatron_hybrid.parallel.quiet import silence_known_warnings

silence_known_warnings()  # megatron-core, below, warns on import

# ruff: noqa: E402
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.parallel.device import communication_backend, setup_device
from megatron_hybrid.parallel.environment import Launch

__all__ = ["Launch", "leave_groups", "start_distributed", "stop_distributed"]

LONGEST_WAIT_MINUTES = 30
"""Of a collective for a rank that does not come: then the run ends."""


def start_distributed(
    launch: Launch,
    parallel: ParallelConfig,
    seed: int,
    timeout_minutes: float = LONGEST_WAIT_MINUTES,
    quiet: bool = False,
) -> ProcessGroupCollection:
    """Choose the device, join the other ranks and form the tensor, context, data and pipeline parallel groups.

    Ranks are numbered tensor parallel first, then context, data, pipeline (megatron-core's `tp-cp-ep-dp-pp`), so that the
    busiest communication stays inside a node.
    """
    chosen = setup_device(launch.local_rank)
    if launch.rank == 0 and not quiet:
        print(chosen, flush=True)
    if not dist.is_initialized():
        _say_where_to_meet(launch)
        dist.init_process_group(
            communication_backend(),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
    virtual = parallel.virtual_pipeline_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def _say_where_to_meet(launch: Launch) -> None:
    """Set MASTER_ADDR and MASTER_PORT, which torch.distributed reads, where the launch has them and for a world of one."""
    if launch.master is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = launch.master[0], str(launch.master[1])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if launch.world_size == 1:
        os.environ.setdefault("MASTER_PORT", "0")


def leave_groups() -> None:
    """Leave all groups but that of all ranks: `start_distributed` may form others. Every rank calls it.

    megatron-core only forgets its groups; here their communicators, and what NCCL allocated for them, go too.
    """
    parallel_state.destroy_model_parallel()
    in_order = list(dist.distributed_c10d._world.pg_map)  # as they were formed, alike on all ranks
    for group in in_order:
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def stop_distributed() -> None:
    """Leave the process groups; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
