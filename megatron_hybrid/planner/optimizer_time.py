"""Time of the optimizer's update on a rank: memory traffic, and the GEMMs of an optimizer that works on whole matrices."""

from functools import lru_cache

from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.arch.optimizers.spec import OptimizerSpec
from megatron_hybrid.config.parallel import averages_exactly
from megatron_hybrid.planner import network
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.layer_wise import whole_shards
from megatron_hybrid.planner.parameters import ChunkLayout, Parameter, chunk_parameters, rank_parameters
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.state import bucket_limit

SHARD_TRAFFIC = 18
"""Bytes per parameter of the shard, besides the optimizer's update: norm 4, clip 8, weight 6."""
GRADIENT_TRAFFIC = 4
"""Bytes per parameter of the rank: set to zero."""
SCALED_TRAFFIC = 8
"""Bytes per parameter of the rank where a kernel divides gradients by the number of replicas, because collectives cannot."""


def optimizer_seconds(plan: Plan, pipeline_rank: int, hardware: Hardware) -> float:
    """Return the time of an update, without calibration factors."""
    of_shard = sum(
        _shard_traffic(ChunkLayout.of(plan, chunk), plan.optimizer) for chunk in plan.chunks_of(pipeline_rank)
    )
    shares = plan.dp_cp if plan.parallel.distributed_optimizer else 1
    divided = plan.dp_cp > 1 and not averages_exactly(plan.dp_cp)
    per_parameter = GRADIENT_TRAFFIC + (SCALED_TRAFFIC if divided else 0)
    moved = of_shard / shares + per_parameter * rank_parameters(plan, pipeline_rank)
    seconds = hardware.copy_seconds("optimizer", moved)
    spec = OPTIMIZERS[plan.optimizer]
    return seconds + (_matrix_seconds(plan, spec, pipeline_rank, hardware) if spec.whole_matrices else 0.0)


@lru_cache(maxsize=1024)
def _shard_traffic(layout: ChunkLayout, optimizer_name: str) -> int:
    """Return the bytes that an update of a whole chunk moves and data parallel ranks share."""
    spec = OPTIMIZERS[optimizer_name]
    return sum(p.numel * (SHARD_TRAFFIC + spec.of(p.packed).update_bytes) for p in chunk_parameters(layout))


def _matrix_seconds(plan: Plan, spec: OptimizerSpec, pipeline_rank: int, hardware: Hardware) -> float:
    """Return the time in which the slowest data parallel rank updates its whole matrices, besides their memory traffic."""
    sharded = plan.parallel.distributed_optimizer
    ranks = plan.dp_cp if sharded else 1
    total = [0.0] * ranks
    for position, chunk in enumerate(plan.chunks_of(pipeline_rank)):
        matrices = [p for p in chunk_parameters(ChunkLayout.of(plan, chunk)) if spec.of(p.packed).whole_matrices]
        if not matrices:
            continue
        shards = whole_shards([p.numel for p in matrices], bucket_limit(plan, chunk, position), ranks)
        seconds = [_update_seconds(plan, spec.of(p.packed), p, hardware) for p in matrices]
        total = [a + b for a, b in zip(total, shards.totals(seconds, ranks), strict=True)]
    return max(total)


def _update_seconds(plan: Plan, spec: OptimizerSpec, parameter: Parameter, hardware: Hardware) -> float:
    rate, group = hardware.linear["bf16"]["forward"], network.groups(plan, hardware.gpus_per_node)["tp"]
    settings = plan.optimizer_settings
    seconds = spec.update_flops(parameter.packed, plan.tp, settings) * rate.per_flop
    return seconds + sum(
        network.seconds(operation, size, group, hardware)
        for operation, size in spec.update_collectives(parameter.packed, plan.tp, settings)
    )
