"""Activation memory and work of Kimi Delta Attention on one rank, for the planner."""

from dataclasses import dataclass

from megatron_hybrid.arch.costs import (
    FP32_BYTES,
    CollectiveWork,
    Direction,
    Gemm,
    MemoryWork,
    Operation,
    RecurrenceWork,
    Shard,
    Work,
    input_linear,
    output_linear,
)

CHUNK = 64
"""Tokens per chunk of fla's kernels."""
RULE_FACTOR = 4.0
"""Time of the rule as a multiple of the gated delta rule's. An estimate, not measured: fla's kernels for the gated delta rule take
2.4 times as long as this project's, and a decay per channel adds to that."""


@dataclass(frozen=True)
class Widths:
    """Channels and heads of the mixer on one rank."""

    key: float
    """Channels of q, of k, and of the decay."""
    value: float
    """Channels of v, and of the gate."""
    heads: float
    packed: float
    """Outputs of in_proj, alignment included."""
    low_rank: float
    """Rows of in_proj for the first halves of both gates' projections."""
    rank: int
    """Channels between the two halves of a gate's projection, on every rank."""
    key_head_dim: float
    value_head_dim: int

    @classmethod
    def of(cls, shard: Shard) -> "Widths":
        """Return the widths of `shard`."""
        shapes = {tensor.name: tensor.shape for parameter in shard.parameters for tensor in parameter.tensors}
        return cls(
            key=shard.width("q_proj.weight"),
            value=shard.width("v_proj.weight"),
            heads=shard.width("A_log"),
            packed=shard.rows("in_proj.weight"),
            low_rank=2 * shard.width("f_a_proj.weight"),
            rank=shapes["f_a_proj.weight"][0],
            key_head_dim=shapes["q_proj.weight"][0] / shapes["A_log"][0],
            value_head_dim=shapes["o_norm.weight"][0],
        )


def operations(shard: Shard) -> list[Operation]:
    """Return the operations of the mixer, first to last. Source of the rule's: fla 0.6.0, ops/kda/chunk_fwd.py and chunk_bwd.py."""
    w, e = Widths.of(shard), shard.element
    inputs = e * (3 * w.key + w.value) + FP32_BYTES * w.heads  # q, k, the decay, v and beta
    scores = 2 * e * CHUNK * w.heads
    states = e * w.value * w.key_head_dim / CHUNK
    again = e * (3 * w.key + 2 * w.value) + FP32_BYTES * w.key  # what its backward pass recomputes
    gradients = FP32_BYTES * (3 * w.key + 2 * CHUNK * w.heads)
    slices = _slice_states(shard, w)
    return [
        *input_linear(shard, "in_proj", w.packed),
        # the low-rank channels are a view of the input, which conv_gates saves for its own recomputation
        Operation("conv_gates", e * w.packed, e * w.packed, recomputed=True, input=e * w.packed),
        Operation("gate projections", e * 2 * w.rank, e * 2 * w.rank, recomputed=True),
        Operation(
            "kda rule",
            inputs + scores + slices,
            inputs,
            extra=again + 2 * states + gradients + slices,
            recomputed=True,
        ),
        Operation("gated norm", 2 * e * w.value, 2 * e * w.value, recomputed=True),
        *output_linear(shard, "out_proj", w.value),
    ]


def _slice_states(shard: Shard, w: Widths) -> float:
    """Return the bytes per token that context parallelism adds: final states next to their transitions in fp32, once per sequence,
    of this rank and of all ranks, and the values of the scan that finds them, with room for the transition's columns.
    """
    if shard.context_parallel_size == 1:
        return 0.0
    columns = w.value + w.heads * w.key_head_dim
    states = FP32_BYTES * w.key_head_dim / shard.slice_length * (shard.context_parallel_size + 2) * columns
    return states + shard.element * (columns + 2 * CHUNK * w.heads)


def work(shard: Shard, direction: Direction) -> list[Work]:
    """Return the work of one pass through the mixer."""
    w, tokens, e = Widths.of(shard), shard.tokens, shard.element
    rows, in_slices = w.heads * shard.micro_batch_size, shard.context_parallel_size > 1
    # the scan that finds a slice's transition has columns for values and keys
    scans = 1 + (w.value_head_dim + w.key_head_dim) / w.value_head_dim if in_slices else 1.0
    found: list[Work] = [
        Gemm(tokens, w.packed, shard.hidden, "column"),
        Gemm(tokens, w.key, w.rank),
        Gemm(tokens, w.value, w.rank),
        RecurrenceWork(
            rows, int(w.key_head_dim * w.value_head_dim), shard.slice_length, RULE_FACTOR * scans, part="kda rule"
        ),
    ]
    if shard.tensor_parallel_size > 1:
        gathered = e * w.low_rank * shard.tensor_parallel_size * tokens
        found.append(CollectiveWork("all_gather" if direction == "forward" else "reduce_scatter", "tp", gathered))
    if in_slices:
        final_states = FP32_BYTES * rows * w.key_head_dim * (w.value_head_dim + w.key_head_dim)
        found.append(CollectiveWork("all_gather", "cp", shard.context_parallel_size * final_states))
    conv = e * (2 * w.key + w.value) + FP32_BYTES * w.heads
    moved = e * w.packed + conv if direction == "forward" else 2 * e * w.packed + conv + e * w.low_rank
    return [
        *found,
        MemoryWork("conv_gates", tokens * moved),
        MemoryWork("gated_norm", tokens * ((3 if direction == "forward" else 5) * e * w.value)),
        Gemm(tokens, shard.hidden, w.value, "row"),
    ]
