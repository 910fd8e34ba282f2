"""Who am I: rank, local rank and world size from the environment a launcher leaves, and the process groups."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.parallel.device import communication_backend, setup_device


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read torchrun's variables; a process started alone is a world of one."""
        env = os.environ
        return cls(int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1)))


def start_distributed(
    launch: Launch, parallel: ParallelConfig, seed: int, timeout_minutes: float = 30, quiet: bool = False
) -> ProcessGroupCollection:
    """Choose the device, join the other ranks and form the tensor, pipeline and data parallel groups.

    Ranks are numbered tensor parallel first, then data, then pipeline (megatron-core's `tp-cp-ep-dp-pp`), so that the
    busiest communication stays inside a node.
    """
    chosen = setup_device(launch.local_rank)
    if launch.rank == 0 and not quiet:
        print(chosen, flush=True)
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if launch.world_size == 1:
            os.environ.setdefault("MASTER_PORT", "0")
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
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def stop_distributed() -> None:
    """Leave the process groups; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
