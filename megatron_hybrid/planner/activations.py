"""Activation memory of a layer: what its forward pass saves, and what its backward pass needs on top of that.

A layer is a list of operations in the order of the forward pass. Mixers bring theirs
(mixers/*/costs.py), and block_costs.py the MLP's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Literal

from megatron_hybrid.arch.costs import Operation, Shard, norm
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.planner.block_costs import mlp_operations
from megatron_hybrid.planner.plan import Plan

Recompute = Literal["none", "selective", "full"]
LOGITS_CHUNK_BYTES = 2**30
"""Largest part of the logits that linear_cross_entropy holds at a time."""


@dataclass(frozen=True)
class LayerBytes:
    """Activation memory of one layer, in bytes per token of a micro-batch."""

    saved: float
    """Kept between the forward and the backward pass."""
    transient: float
    """Peak of the backward pass beyond `saved`. What it frees on the way is counted."""


def layer_operations(shard: Shard) -> list[Operation]:
    """Return the operations of a layer, first to last."""
    return [*mixer_spec(shard.block.mixer).operations(shard), *mlp_operations(shard)]


@lru_cache(maxsize=4096)
def layer_bytes(shard: Shard, recompute: Recompute) -> LayerBytes:
    """Return the activation memory of a layer."""
    operations, residual = layer_operations(shard), shard.element * shard.hidden * shard.stream_share
    if recompute == "selective":
        operations = _selective(operations)
    saved = sum(operation.saved for operation in operations)
    peak = backward_peak(operations, residual)
    if recompute == "full":  # only the layer's input is kept; the backward pass starts by recomputing the whole layer
        return LayerBytes(residual, peak - residual)
    return LayerBytes(saved, peak - saved)


def backward_peak(operations: Sequence[Operation], residual: float) -> float:
    """Return the peak memory of a layer's backward pass in bytes per token, with everything that the layer saved.

    Args:
        residual: bytes of the residual stream's gradient, which waits while a sublayer runs backward.
    """
    left, incoming, peak = sum(operation.saved for operation in operations), residual, 0.0
    for operation in reversed(operations):
        peak = max(peak, left + residual + incoming + operation.gradient + operation.extra)
        left, incoming = left - operation.saved, operation.gradient
    return peak


def _selective(operations: list[Operation]) -> list[Operation]:
    """Return the operations under selective recompute, with neighbors that are recomputed together joined into one.

    The joined operation keeps the input of its first one, and needs the memory of all while it runs. The linear behind it has its
    input back by then.
    """
    joined: list[Operation] = []
    for recomputed, group in groupby(operations, key=lambda operation: operation.recomputed):
        inside = list(group)
        if not recomputed:
            if joined:
                inside[0] = replace(inside[0], saved=inside[0].saved - inside[0].keeps_input)
            joined += inside
            continue
        kept = inside[0].input
        peak = backward_peak(inside, 0.0)
        joined.append(Operation("recomputed", kept, inside[0].gradient, extra=peak - kept - inside[0].gradient))
    return joined


def embedding_bytes(plan: Plan) -> float:
    """Return the bytes of a micro-batch that the embedding's norm saves. Without a norm only token ids are saved."""
    if not plan.model.embedding_norm:
        return 0.0
    return norm(plan.shards[plan.model.layers[0]], "embedding norm").saved * plan.tokens


@dataclass(frozen=True)
class HeadBytes:
    """Memory of the last stage's final norm, output layer and losses, in bytes of a micro-batch."""

    saved: float
    """From the forward pass to the backward pass, which follows at once: gradients of the hidden states and the weight."""
    logits: float
    """Chunk of the logits, while the forward pass runs."""


def head_bytes(plan: Plan) -> HeadBytes:
    """Return the memory of the head. linear_cross_entropy computes the gradients in its forward pass, chunk by chunk of the logits."""
    shard, vocab, tokens = plan.shards[plan.model.layers[-1]], plan.vocab, plan.tokens
    saved_by_norm = norm(shard, "final norm").saved * tokens
    hidden = shard.element * shard.hidden * tokens
    gathered = hidden if shard.sequence_parallel else shard.element * shard.hidden * shard.stream_share * tokens
    logits = min(shard.element * vocab * tokens, LOGITS_CHUNK_BYTES)
    return HeadBytes(saved_by_norm + hidden + 4 * vocab * shard.hidden, logits + gathered)
