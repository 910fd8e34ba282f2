"""Checks of train.cuda_graph_impl: what a graph cannot repeat is refused (train/cuda_graph.py)."""

from collections.abc import Iterator

from megatron_hybrid.base.errors import Problems
from megatron_hybrid.config.debug import DebugConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig

FIELD = "train.cuda_graph_impl"


def check_cuda_graphs(
    train: TrainConfig, parallel: ParallelConfig, precision: PrecisionConfig, debug: DebugConfig, problems: Problems
) -> None:
    """Check that a step consists of what a graph can repeat. `auto` is checked alike: its configuration is one for GPUs."""
    if train.cuda_graph_impl == "none":
        return
    for reason, remedy in _obstacles(train, parallel, precision, debug):
        problems.add(FIELD, f"{train.cuda_graph_impl} {reason}; set it to none, or {remedy}")


def _obstacles(
    train: TrainConfig, parallel: ParallelConfig, precision: PrecisionConfig, debug: DebugConfig
) -> Iterator[tuple[str, str]]:
    """Yield why graphs cannot run, each with another remedy than to do without them."""
    if train.engine == "deepspeed":
        yield "is for megatron-core's schedules", "train.engine to megatron"
    if parallel.pipeline_parallel_size > 1:
        yield (
            "does not capture the exchange between pipeline stages, whose ranks would have to capture at the same time",
            "parallel.pipeline_parallel_size to 1",
        )
    if parallel.overlap_grad_reduce:
        yield (
            "reduces gradients after the backward pass, when data parallel ranks need not capture at the same time",
            "parallel.overlap_grad_reduce and overlap_param_gather to false",
        )
    if parallel.tp_comm_overlap:
        yield (
            "does not capture Transformer Engine's user buffers, whose counters are on the host",
            "parallel.tp_comm_overlap to false",
        )
    if precision.fp8 or precision.fp8_attention:
        yield (
            "does not repeat what Transformer Engine does with FP8 scales and casts of weights on the host",
            "precision.fp8_recipe to null",
        )
    if train.optimizer.offload_fraction:
        yield "cannot update parameters on the host", "train.optimizer.offload_fraction to 0.0"
    if debug.nvtx_ranges:
        yield "runs no Python in which the phases of a step could be marked", "debug.nvtx_ranges to false"
