"""Form and leave the tensor, context, data and pipeline parallel groups."""

import torch
import torch.distributed as dist

from megatron_hybrid.distributed.quiet import silence_known_warnings

silence_known_warnings()  # importing megatron-core, below, warns

# ruff: noqa: E402
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.config.parallel import ParallelConfig

LONGEST_WAIT_MINUTES = 30
"""Time after which a collective that waits for a missing rank ends the run."""


def form_groups(parallel: ParallelConfig, seed: int) -> ProcessGroupCollection:
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
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


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
