"""Activation memory and work of Gated DeltaNet on one rank, for the planner."""

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
"""Tokens per chunk of the delta rule."""
SLICE_SCAN = {"forward": 0.75, "backward": 0.3}
"""Time of a context parallel slice's first scan, as a share of the delta rule's. Measured with 15 heads in two segments: 192 us
of 255 us forward, of 647 us backward (docs/development/lab-notes.md)."""

WITH_KEPT_STATES = 0.85
"""Time of a backward pass that finds the states kept, as a share of that of one that computes them again. Measured with 30 heads at
8,192 tokens: 0.83 with one sequence, 0.87 with four (benchmarks/kept_states.py)."""


@dataclass(frozen=True)
class Widths:
    """Channels and heads of the mixer on one rank."""

    key: float
    """Channels of q, and of k."""
    value: float
    """Channels of v, and of the gate."""
    heads: float
    """Value heads, which each have a state."""
    packed: float
    """Outputs of in_proj, alignment included."""
    key_head_dim: int
    value_head_dim: int

    @property
    def state(self) -> int:
        """Entries of a head's state."""
        return self.key_head_dim * self.value_head_dim

    @property
    def transition_tiles(self) -> int:
        """Tiles of CHUNK columns that cover a head's key channels."""
        return -(-self.key_head_dim // CHUNK)

    @property
    def conv_outputs(self) -> float:
        """Channels of q, k and v."""
        return 2 * self.key + self.value

    @classmethod
    def of(cls, shard: Shard) -> "Widths":
        """Return the widths of `shard`."""
        shapes = {tensor.name: tensor.shape for parameter in shard.parameters for tensor in parameter.tensors}
        key_heads = next(parameter.groups for parameter in shard.parameters if parameter.name == "in_proj.weight")
        return cls(
            key=shard.width("q_proj.weight"),
            value=shard.width("v_proj.weight"),
            heads=shard.width("A_log"),
            packed=shard.rows("in_proj.weight"),
            key_head_dim=shapes["q_proj.weight"][0] // key_heads,
            value_head_dim=shapes["o_norm.weight"][0],
        )


def operations(shard: Shard) -> list[Operation]:
    """Return the operations of the mixer, first to last."""
    w, e = Widths.of(shard), shard.element
    scores = w.heads * (2 * e * CHUNK + 4)  # A and P [64, 64] of every chunk, and G
    states = e * w.value * w.key_head_dim / CHUNK  # incoming state of every chunk, and as much for its gradient
    kept = states + e * w.value  # with the chunks' new values
    saved, made = (kept, states) if shard.keep_delta_rule_states else (0.0, kept + states)
    slice_states, exchanged = _slice_states(shard, w)
    return [
        *input_linear(shard, "in_proj", w.packed),
        # the gate is a view of the input, which conv_gates saves for its own recomputation
        Operation("conv_gates", e * w.packed, e * w.packed, recomputed=True, input=e * w.packed),
        Operation(
            "delta rule",
            e * w.conv_outputs + 8 * w.heads + scores + slice_states + saved,
            e * w.conv_outputs + 8 * w.heads,
            extra=made + 4 * w.heads * w.transition_tiles + exchanged,
            recomputed=True,
        ),
        Operation("gated norm", e * w.value, 2 * e * w.value, recomputed=True),
        *output_linear(shard, "out_proj", w.value),
    ]


def _slice_states(shard: Shard, w: Widths) -> tuple[float, float]:
    """Return the bytes per token that context parallelism saves and exchanges, in fp32.

    A rank saves the state before its slice, the slice's own final state and its transition. Those of all ranks are there while
    they are exchanged. They exist once per sequence.
    """
    if shard.context_parallel_size == 1:
        return 0.0, 0.0
    columns = w.value + w.heads * CHUNK * w.transition_tiles  # final states, next to their transitions
    rows = FP32_BYTES * w.key_head_dim / shard.slice_length
    saved = rows * (w.value + columns)
    return saved, rows * (shard.context_parallel_size + 1) * (w.value + w.heads * w.key_head_dim)


def work(shard: Shard, direction: Direction) -> list[Work]:
    """Return the work of one pass through the mixer."""
    w, tokens = Widths.of(shard), shard.tokens
    in_slices, rows = shard.context_parallel_size > 1, w.heads * shard.micro_batch_size
    factor = 1 + SLICE_SCAN[direction] if in_slices else 1.0
    if shard.keep_delta_rule_states and direction == "backward":
        factor *= WITH_KEPT_STATES
    found: list[Work] = [
        Gemm(tokens, w.packed, shard.hidden, "column"),
        RecurrenceWork(rows, w.state, shard.slice_length, factor, part="delta rule"),
    ]
    if in_slices:
        final_states = 4 * rows * w.key_head_dim * (w.value_head_dim + w.key_head_dim)
        found.append(CollectiveWork("all_gather", "cp", shard.context_parallel_size * final_states))
    return [
        *found,
        MemoryWork("conv_gates", tokens * _conv_gates_bytes(w, shard.element, direction)),
        MemoryWork("gated_norm", tokens * ((3 if direction == "forward" else 5) * shard.element * w.value)),
        Gemm(tokens, shard.hidden, w.value, "row"),
    ]


def _conv_gates_bytes(w: Widths, e: int, direction: Direction) -> float:
    """Return the bytes per token that the convolution and the gates move."""
    results, read = e * w.conv_outputs + 8 * w.heads, e * w.packed
    return read + results if direction == "forward" else 2 * read + results + 2 * e * w.value
