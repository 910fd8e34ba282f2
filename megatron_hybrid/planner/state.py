"""Bytes of weights, gradients and optimizer state on a rank, exact.

megatron-core's data parallel wrapper lays the parameters of a model chunk out in one buffer per dtype, last parameter first, with
padding under the distributed optimizer (param_layout.py, distrib_optimizer.py). A rank's optimizer holds its slice of each
bucket, or whole matrices (planner/layer_wise.py). This file repeats both.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.arch.optimizers.spec import FP32_BYTES, OptimizerSpec
from megatron_hybrid.arch.packing import round_up
from megatron_hybrid.arch.tensors import model_parameters
from megatron_hybrid.planner.layer_wise import BUCKET_ALIGNMENT, PARAMETER_ALIGNMENT, whole_shards
from megatron_hybrid.planner.parameters import ChunkLayout, Parameter, chunk_parameters
from megatron_hybrid.planner.plan import Chunk, Plan

GRADIENT_BYTES = FP32_BYTES

Span = tuple[int, int]
"""(start, end) in elements of a buffer."""


@dataclass(frozen=True)
class StateBytes:
    """Memory that a rank holds between steps."""

    weights: int
    gradients: int
    optimizer: int
    """On the device. An offloaded share is taken as large as it was asked for; whole tensors make the host's a little larger."""
    host: int = 0
    """In host memory, for the offloaded share of the optimizer state."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.host + other.host,
        )


def rank_state(plan: Plan, pipeline_rank: int, dp_rank: int | None = None) -> StateBytes:
    """Return the bytes of all chunks of a rank.

    Args:
        dp_rank: its place among the data and context parallel ranks. None: the first, with the largest share of whole matrices.
    """
    chunks = plan.chunks_of(pipeline_rank)
    states = (_chunk_state(plan, chunk, position, dp_rank) for position, chunk in enumerate(chunks))
    return sum(states, StateBytes(0, 0, 0))


def per_parameter_bytes(plan: Plan) -> float:
    """Return the mean bytes of weight, gradient and optimizer state per parameter of a rank."""
    state = _mean_optimizer_bytes(plan.model, plan.optimizer, plan.element) * (1 - plan.offload_fraction)
    return plan.element + GRADIENT_BYTES + state / (plan.dp_cp if plan.parallel.distributed_optimizer else 1)


def _optimizer_bytes(optimizer: OptimizerSpec, size: int) -> int:
    """Return the bytes of optimizer state, master weight included, per parameter of `size` bytes."""
    return optimizer.state_bytes + (FP32_BYTES if size < FP32_BYTES else 0)


@lru_cache(maxsize=64)
def _mean_optimizer_bytes(model: ModelConfig, optimizer_name: str, size: int) -> float:
    spec, total, count = OPTIMIZERS[optimizer_name], 0, 0
    for parameter in model_parameters(model):
        total += parameter.numel * _optimizer_bytes(spec.of(parameter), size)
        count += parameter.numel
    return total / count


def _chunk_state(plan: Plan, chunk: Chunk, position: int, dp_rank: int | None) -> StateBytes:
    """Return the bytes of one model chunk. `position`: its place among its rank's chunks."""
    return _state(
        ChunkLayout.of(plan, chunk),
        bucket_limit(plan, chunk, position),
        plan.dp_cp,
        dp_rank,
        plan.element,
        plan.parallel.distributed_optimizer,
        plan.offload_fraction,
        plan.optimizer,
    )


@lru_cache(maxsize=4096)
def _state(
    layout: ChunkLayout,
    limit: int | None,
    dp: int,
    dp_rank: int | None,
    element: int,
    sharded: bool,
    offloaded: float,
    optimizer_name: str,
) -> StateBytes:
    spec = OPTIMIZERS[optimizer_name]
    total = StateBytes(0, 0, 0)
    buffers: dict[tuple[int, bool], list[Parameter]] = {}
    for parameter in chunk_parameters(layout):
        whole = spec.of(parameter.packed).whole_matrices
        buffers.setdefault((parameter.size(element), whole), []).append(parameter)
    for (size, whole), group in buffers.items():
        numel, mine = _share(group, whole, limit, dp, dp_rank, sharded)
        state = sum(count * _optimizer_bytes(spec.of(parameter.packed), size) for parameter, count in mine)
        on_host = sum(count * spec.of(parameter.packed).host_bytes for parameter, count in mine)
        total += StateBytes(
            numel * size, numel * GRADIENT_BYTES, round(state * (1 - offloaded)), round(on_host * offloaded)
        )
    return total


def _share(
    group: list[Parameter], whole: bool, limit: int | None, dp: int, dp_rank: int | None, sharded: bool
) -> tuple[int, list[tuple[Parameter, int]]]:
    """Return the elements of a buffer, and how many of each parameter a data parallel rank's optimizer holds."""
    if whole and sharded:
        sizes = tuple(parameter.numel for parameter in group)
        shards = whole_shards(sizes, limit, dp)
        dp_rank = shards.fullest(sizes) if dp_rank is None else dp_rank
        mine = [(p, p.numel) for p, owner in zip(group, shards.owners, strict=True) if owner == dp_rank]
        return shards.numel, mine
    spans = buckets(tuple(group), limit, dp, sharded)
    numel = spans[-1][-1][1]
    if not sharded:
        return numel, [(parameter, parameter.numel) for parameter in group]
    held = [count for bucket in spans for count in _held(bucket, dp, dp_rank or 0)]
    return numel, list(zip(reversed(group), held, strict=True))


def buckets(parameters: tuple[Parameter, ...], limit: int | None, dp: int, padded: bool) -> list[list[Span]]:
    """Lay parameters of one dtype out in buckets. Each bucket is the spans of its parameters, and last its own span.

    Args:
        limit: elements after which a bucket is full. None: one bucket.
        padded: align parameters and buckets as the distributed optimizer needs it.
    """
    found: list[list[Span]] = []
    here: list[Span] = []
    at = begin = 0
    end_alignment = math.lcm(dp, BUCKET_ALIGNMENT) if padded else 1

    def close(at: int) -> int:
        nonlocal here, begin
        end = round_up(at, end_alignment)
        found.append([*here, (begin, end)])
        here, begin = [], end
        return end

    for parameter in reversed(parameters):
        at = round_up(at, PARAMETER_ALIGNMENT) if padded else at
        if padded and parameter.own_bucket and here:
            at = close(at)
        here.append((at, at + parameter.numel))
        at += parameter.numel
        if (limit is not None and at - begin >= limit) or (padded and parameter.own_bucket):
            at = close(at)
    if here:
        close(at)
    return found


def _held(bucket: list[Span], dp: int, dp_rank: int) -> list[int]:
    """Return how many elements of each of a bucket's parameters lie in a data parallel rank's slice of it."""
    *spans, (begin, end) = bucket
    share = (end - begin) // dp
    low, high = begin + dp_rank * share, begin + (dp_rank + 1) * share
    return [max(0, min(high, stop) - max(low, start)) for start, stop in spans]


def bucket_limit(plan: Plan, chunk: Chunk, position: int) -> int | None:
    """Return the elements per bucket, or None for a single one.

    Buckets are cut only where reduction overlaps the backward pass, and then on the first pipeline rank's first chunk. Elsewhere
    reduction is not on the critical path (distributed_data_parallel.py).
    """
    first = chunk.stage % plan.pp == 0 and position == 0
    return max(40_000_000, 1_000_000 * plan.dp_cp) if plan.parallel.overlap_grad_reduce and first else None
