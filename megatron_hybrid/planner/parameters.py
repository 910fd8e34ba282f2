"""A rank's parameters as the trainer holds them, and the bytes of weights, gradients and optimizer state: exact.

megatron-core's data parallel wrapper lays the parameters of a model chunk out in one buffer a dtype, last parameter first, with
padding under the distributed optimizer (param_layout.py, distrib_optimizer.py); what a rank's optimizer holds is its
slice of each bucket. Both are repeated here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from megatron_hybrid.arch.model import LayerKind, ModelConfig
from megatron_hybrid.planner.plan import Chunk, Plan, Widths

PARAMETER_ALIGNMENT = 64  # elements, param_layout.py:pad_param_start
BUCKET_ALIGNMENT = 128  # elements, param_layout.py:bucket_end_divisor
GRADIENT_BYTES = 4
MOMENT_BYTES = 8  # two of Adam
MASTER_BYTES = 4
HOST_BYTES = MOMENT_BYTES + 4 + GRADIENT_BYTES
"""A parameter whose state is in host memory: moments, an fp32 copy of it, and its gradient."""
MATRICES = ("in_proj", "out_proj", "qkv", "o_proj", "fc1", "fc2")
"""Of a layer, what Transformer Engine multiplies by."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of a rank."""

    name: str
    numel: int
    always_fp32: bool = False
    own_bucket: bool = False
    """Tied embedding of a pipeline's ends."""
    in_fp8: bool = False

    def size(self, element: int) -> int:
        """Bytes of a value, where `element` are those of the model's dtype."""
        return 4 if self.always_fp32 else 1 if self.in_fp8 else element


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds between steps."""

    weights: int
    gradients: int
    optimizer: int
    """On the device. A part that is offloaded is taken for as large as was asked: by whole tensors, the host's is larger."""
    host: int = 0
    """In host memory, for the part of the optimizer's state that is offloaded."""

    @property
    def total(self) -> int:
        """On the device."""
        return self.weights + self.gradients + self.optimizer


def layer_parameters(model: ModelConfig, kind: LayerKind, widths: Widths) -> Iterator[tuple[str, float, bool]]:
    """(name, elements, always fp32) of a layer's tensors on a rank, in the order of the module's parameters."""
    w, h = widths, model.hidden_size
    if kind == "G":
        gdn = model.gdn
        assert gdn is not None, "validated: a model with G layers has gdn"
        yield "mixer_norm", h, False
        yield "conv", (2 * w.gdn_key + w.gdn_value) * gdn.conv_kernel_size, False
        yield "A_log", w.gdn_heads, True
        yield "dt_bias", w.gdn_heads, True
        yield "o_norm", gdn.value_head_dim, False
        yield "in_proj", w.gdn_packed * h, False
        yield "out_proj", w.gdn_value * h, False
        yield "mlp_norm", h, False
        yield "fc1", 2 * w.ffn * h, False
        yield "fc2", w.ffn * h, False
        return
    yield "q_norm", w.q, False
    yield "k_norm", w.kv, False
    yield "qkv", (w.q + 2 * w.kv) * h, False
    yield "o_proj", w.q * h, False
    yield "mixer_norm", h, False
    yield "fc1", 2 * w.ffn * h, False
    yield "fc2", w.ffn * h, False
    yield "mlp_norm", h, False


def chunk_parameters(plan: Plan, chunk: Chunk) -> tuple[Parameter, ...]:
    """Of one model chunk on one rank."""
    return _parameters(
        plan.model, plan.tp, chunk.kinds, chunk.embedding, chunk.head, plan.pp > 1, _held_in_fp8(plan, chunk)
    )


def _held_in_fp8(plan: Plan, chunk: Chunk) -> tuple[bool, ...]:
    """Of each layer, whether its matrices are held in FP8; empty where none's are."""
    precision = plan.precision
    if not precision.fp8_param_gather:
        return ()
    low, high = precision.num_layers_at_start_in_bf16, plan.model.num_layers - precision.num_layers_at_end_in_bf16
    return tuple(low <= layer < high for layer, _ in enumerate(chunk.kinds, chunk.first_layer))


@lru_cache(maxsize=1024)
def _parameters(
    model: ModelConfig, tp: int, kinds, embedding: bool, head: bool, pipeline: bool, fp8: tuple[bool, ...] = ()
) -> tuple[Parameter, ...]:
    widths, h = Widths.padded(model, tp), model.hidden_size
    table, tied = int(widths.vocab) * h, model.tie_embeddings
    found = [Parameter("embedding", table, own_bucket=tied and pipeline)] if embedding else []
    for kind, in_fp8 in zip(kinds, fp8 or (False,) * len(kinds), strict=True):
        found += [
            Parameter(name, int(size), fp32, in_fp8=in_fp8 and name in MATRICES)
            for name, size, fp32 in layer_parameters(model, kind, widths)
        ]
    if head:
        found.append(Parameter("final_norm", h))
        if not tied or (pipeline and not embedding):
            found.append(Parameter("output", table, own_bucket=tied))
    return tuple(found)


@lru_cache(maxsize=1024)
def _count(model: ModelConfig, tp: int, kinds, embedding: bool, head: bool, pipeline: bool) -> int:
    return sum(parameter.numel for parameter in _parameters(model, tp, kinds, embedding, head, pipeline))


def buckets(parameters: tuple[Parameter, ...], limit: int | None, dp: int, padded: bool) -> list[list[tuple[int, int]]]:
    """Where parameters of one dtype lie: a list of buckets, each of (start, end) in elements, and last the bucket's own.

    Args:
        limit: elements after which a bucket is full; None: one bucket.
        padded: for the distributed optimizer.
    """
    found: list[list[tuple[int, int]]] = []
    here: list[tuple[int, int]] = []
    at = begin = 0
    end_alignment = math.lcm(dp, BUCKET_ALIGNMENT) if padded else 1

    def close(at: int) -> int:
        nonlocal here, begin
        end = _round_up(at, end_alignment)
        found.append([*here, (begin, end)])
        here, begin = [], end
        return end

    for parameter in reversed(parameters):
        at = _round_up(at, PARAMETER_ALIGNMENT) if padded else at
        if padded and parameter.own_bucket and here:
            at = close(at)
        here.append((at, at + parameter.numel))
        at += parameter.numel
        if (limit is not None and at - begin >= limit) or (padded and parameter.own_bucket):
            at = close(at)
    if here:
        close(at)
    return found


def chunk_state(plan: Plan, chunk: Chunk, position: int, dp_rank: int = 0) -> StateBytes:
    """Of one model chunk. `position`: its place among its rank's chunks. `dp_rank`: among the data and context parallel ranks."""
    which = plan.model, plan.tp, chunk.kinds, chunk.embedding, chunk.head, plan.pp > 1, _held_in_fp8(plan, chunk)
    limit = _bucket_limit(plan, chunk, position)
    return _state(which, limit, plan.sharing, dp_rank, plan.element, _sharded(plan), plan.offload_fraction)


@lru_cache(maxsize=4096)
def _state(which, limit, dp: int, dp_rank: int, element: int, sharded: bool, offloaded: float) -> StateBytes:
    parameters = _parameters(*which)
    weights = gradients = optimizer = host = 0
    by_size: dict[int, list[Parameter]] = {}
    for parameter in parameters:
        by_size.setdefault(parameter.size(element), []).append(parameter)
    for size, group in by_size.items():
        state_bytes = MOMENT_BYTES + (MASTER_BYTES if size < 4 else 0)
        layout = buckets(tuple(group), limit, dp, sharded)
        numel = layout[-1][-1][1]
        weights += numel * size
        gradients += numel * GRADIENT_BYTES
        held = sum(p.numel for p in group) if not sharded else sum(_held(bucket, dp, dp_rank) for bucket in layout)
        optimizer += round(held * state_bytes * (1 - offloaded))
        host += round(held * HOST_BYTES * offloaded)
    return StateBytes(weights, gradients, optimizer, host)


def _held(bucket: list[tuple[int, int]], dp: int, dp_rank: int) -> int:
    """Elements of a bucket's parameters that lie in a data parallel rank's slice of it."""
    *spans, (begin, end) = bucket
    share = (end - begin) // dp
    low, high = begin + dp_rank * share, begin + (dp_rank + 1) * share
    return sum(max(0, min(high, stop) - max(low, start)) for start, stop in spans)


def rank_state(plan: Plan, pipeline_rank: int, dp_rank: int = 0) -> StateBytes:
    """Of all chunks of a rank."""
    states = [chunk_state(plan, chunk, i, dp_rank) for i, chunk in enumerate(plan.chunks_of(pipeline_rank))]
    return StateBytes(
        sum(s.weights for s in states),
        sum(s.gradients for s in states),
        sum(s.optimizer for s in states),
        sum(s.host for s in states),
    )


def rank_parameters(plan: Plan, pipeline_rank: int) -> int:
    """Parameters of a rank, dummy heads included, alignment not."""
    chunks, pipeline = plan.chunks_of(pipeline_rank), plan.pp > 1
    return sum(_count(plan.model, plan.tp, c.kinds, c.embedding, c.head, pipeline) for c in chunks)


def dummy_head_parameters(plan: Plan, pipeline_rank: int) -> float:
    """Of a rank's parameters those that only padding of heads, widths and vocabulary adds, as a mean over its tensor
    parallel group."""
    total = 0.0
    for chunk in plan.chunks_of(pipeline_rank):
        for kind in chunk.kinds:
            total += _layer_padding(plan.model, kind, plan.tp)
        table = (plan.widths.vocab - plan.true_widths.vocab) * plan.model.hidden_size
        total += table * (chunk.embedding + (chunk.head and not plan.model.tie_embeddings))
    return total


@lru_cache(maxsize=256)
def _layer_padding(model: ModelConfig, kind: LayerKind, tp: int) -> float:
    padded, true = (
        sum(size for _, size, _ in layer_parameters(model, kind, widths))
        for widths in (Widths.padded(model, tp), Widths.true(model, tp))
    )
    return padded - true


def _sharded(plan: Plan) -> bool:
    return plan.parallel.distributed_optimizer


def _bucket_limit(plan: Plan, chunk: Chunk, position: int) -> int | None:
    """Buckets are cut only where reduction overlaps the backward pass, and then on the first pipeline rank's first chunk:
    elsewhere it is not on the critical path (distributed_data_parallel.py)."""
    first = chunk.stage % plan.pp == 0 and position == 0
    return max(40_000_000, 1_000_000 * plan.sharing) if plan.parallel.overlap_grad_reduce and first else None


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
