"""Vocabulary of a layer's costs: the part that a rank holds, operations (activation memory) and work (time).

Mixers describe their costs in these terms (mixers/*/costs.py). The planner turns operations into peak memory and work into
seconds, without knowing any mixer.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import PackedParameter

Direction = Literal["forward", "backward"]
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "p2p"]
FP32_BYTES = 4


@dataclass(frozen=True)
class Shard:
    """Part of a layer on one rank for one micro-batch, and the settings on which its costs depend."""

    model: ModelFields
    block: Block
    parameters: tuple[PackedParameter, ...] = field(compare=False, repr=False)
    """Parameters of the mixer, as its spec declares them for this model and block."""
    element: int
    """Bytes per activation and per weight."""
    sequence_length: int
    micro_batch_size: int
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    transformer_engine: bool = True
    """Linears and attention are Transformer Engine's, and norms run in Triton or are Transformer Engine's. False: PyTorch's."""
    fp8: bool = False
    """The linears multiply in FP8."""
    fp8_attention: bool = False
    keep_delta_rule_states: bool = False
    """Delta rules keep the states of their chunks for the backward pass, instead of computing them again."""
    attended_length: int | None = None
    """Attended length of documents (arch/documents.py). None: a sequence is one document."""
    padded: bool = True
    """Sizes include the padding that tensor parallelism needs. False: as if heads could be split anywhere."""

    def rows(self, parameter: str) -> float:
        """Return the rank's rows of a parameter of the mixer: the outputs of a column-parallel linear."""
        (found,) = (one for one in self.parameters if one.name == parameter)
        if self.padded:
            return found.rank_shape(self.tensor_parallel_size)[0]
        return sum(tensor.shape[0] for tensor in found.tensors) / self.tensor_parallel_size

    def width(self, tensor: str) -> float:
        """Return the rank's extent of a tensor of the mixer along the dimension that tensor parallelism splits."""
        found = {one.name: (parameter, one) for parameter in self.parameters for one in parameter.tensors}
        parameter, one = found[tensor]
        if self.padded:
            return parameter.rank_size(one, self.tensor_parallel_size)
        return one.shape[parameter.dim] / self.tensor_parallel_size

    @property
    def hidden(self) -> int:
        return self.model.hidden_size

    @property
    def ffn(self) -> float:
        """MLP channels on the rank."""
        ffn, ranks = self.model.ffn_hidden_size, self.tensor_parallel_size
        return ffn // ranks if self.padded else ffn / ranks

    @property
    def slice_length(self) -> int:
        """Tokens of each sequence on a context parallel rank."""
        return self.sequence_length // self.context_parallel_size

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a context parallel rank, over all tensor parallel ranks."""
        return self.slice_length * self.micro_batch_size

    @property
    def stream_share(self) -> float:
        """Share of the residual stream that the rank holds: 1 / TP size under sequence parallelism."""
        return 1 / self.tensor_parallel_size if self.sequence_parallel else 1.0

    @property
    def linear_input(self) -> float:
        """Bytes per element that a linear saves for its weight gradient. FP8 saves the transposed cast alone."""
        return 1.0 if self.fp8 else float(self.element)


# Activation memory. Sources: Transformer Engine 2.20's save_for_backward calls (layernorm_linear.py, linear.py, backends.py),
# megatron-core's fused SwiGLU, and the autograd functions of hybrid_kernels.


@dataclass(frozen=True)
class Operation:
    """Activation memory of one operation of a layer, in bytes per token of the micro-batch on one rank."""

    name: str
    saved: float
    """Saved for the backward pass, without what an earlier operation saves anyway."""
    gradient: float
    """Gradients of the inputs, which the backward pass writes."""
    extra: float = 0.0
    """Temporary memory of the backward pass."""
    recomputed: bool = False
    """Selective recompute repeats the operation, and its neighbors of this kind. The first of them keeps its input."""
    input: float = 0.0
    """Input of the first recomputed operation, which stays."""
    keeps_input: float = 0.0
    """Share of `saved` that is the input itself. It is not saved where selective recompute produces it again; an FP8 cast is."""


def input_linear(shard: Shard, name: str, out: float) -> list[Operation]:
    """Return the operations of a sublayer's column-parallel linear, with the block's norm in front where it has one."""
    linear = column_linear(shard, name, out)
    if shard.block.norm == "post":
        return [linear]
    stream, e = shard.stream_share, shard.element
    fp32_copy = 0.0 if shard.transformer_engine or e == FP32_BYTES else FP32_BYTES * shard.hidden * stream
    saved = stream * (e * shard.hidden + FP32_BYTES) + fp32_copy
    return [Operation(f"{name}: norm", saved, e * shard.hidden * stream), linear]


def output_linear(shard: Shard, name: str, inner: float, saved: float | None = None) -> list[Operation]:
    """Return the operations of a sublayer's row-parallel linear, with the block's norm behind it where it has one."""
    linear = row_linear(shard, name, inner, saved)
    return [linear] if shard.block.norm == "pre" else [linear, norm(shard, "post-norm")]


def column_linear(shard: Shard, name: str, out: float) -> Operation:
    """Column-parallel linear. It saves its input as the rank holds it and gathers it again for the weight gradient."""
    e, h, kept = shard.element, shard.hidden, shard.linear_input
    gathered = (kept + e) * h if shard.sequence_parallel else 0.0  # the input, and the gradient before it is scattered
    casts = 2 * out if shard.fp8 else 0.0  # FP8 casts of the output's gradient, row-wise and column-wise
    return Operation(name, kept * h * shard.stream_share, e * h * shard.stream_share, extra=gathered + casts)


def row_linear(shard: Shard, name: str, inner: float, saved: float | None = None) -> Operation:
    """Row-parallel linear with `inner` input channels on the rank.

    Args:
        saved: bytes per token that it saves. None: its input.
    """
    gathered = shard.element * shard.hidden if shard.sequence_parallel else 0.0
    casts = 2 * shard.hidden if shard.fp8 else 0.0
    kept = shard.linear_input * inner if saved is None else saved
    return Operation(name, kept, shard.element * inner, extra=gathered + casts, keeps_input=0.0 if shard.fp8 else kept)


def norm(shard: Shard, name: str) -> Operation:
    """RMSNorm over the residual stream, outside of a linear."""
    kept = shard.element if shard.transformer_engine else FP32_BYTES  # PyTorch's norm runs on an fp32 copy
    stream = shard.stream_share
    return Operation(name, stream * (kept * shard.hidden + FP32_BYTES), shard.element * shard.hidden * stream)


# Time. `part` is the row of the step's time table to which the seconds are added.


@dataclass(frozen=True)
class Gemm:
    """Product of [m, k] with a weight [n, k]."""

    m: float
    n: float
    k: float
    parallel: Literal["column", "row"] | None = None
    """Place at a sublayer's start or end, where tensor parallel ranks communicate. None: in between, always in bf16."""
    part: str = "GEMMs"

    def flops(self, direction: Direction) -> float:
        """One product forward, two backward."""
        return (1 if direction == "forward" else 2) * 2.0 * self.m * self.n * self.k

    def bytes(self, direction: Direction) -> float:
        """Fewest bytes that a pass moves, in bf16 with an fp32 buffer for the weight gradient."""
        m, n, k = self.m, self.n, self.k
        inputs = 2 * (m * k + n * k + m * n)
        return inputs if direction == "forward" else 2 * inputs + 8 * n * k


@dataclass(frozen=True)
class AttentionWork:
    """Softmax attention."""

    flops: float
    part: str = "attention"


@dataclass(frozen=True)
class RecurrenceWork:
    """Chunked linear recurrence."""

    rows: float
    """Heads x sequences."""
    state: int
    """Entries of one head's state."""
    tokens: float
    """Tokens of each sequence."""
    factor: float = 1.0
    """Multiple of the measured time, for example where a slice is scanned twice."""
    part: str = "recurrence"


@dataclass(frozen=True)
class MemoryWork:
    """Memory-bound operation."""

    operation: str
    """Name by which the hardware file may give its efficiency."""
    bytes: float
    """Bytes read and written."""
    part: str = "memory-bound operations"


@dataclass(frozen=True)
class CollectiveWork:
    """Collective of a mixer among tensor (`tp`) or context parallel (`cp`) ranks, which nothing hides."""

    operation: Collective
    group: Literal["tp", "cp"]
    bytes: float
    """Bytes of the whole tensor."""

    @property
    def part(self) -> str:
        return f"{self.group.upper()} communication"


Work = Gemm | AttentionWork | RecurrenceWork | MemoryWork | CollectiveWork


def attention_flops(
    sequence: float, batch: float, width: float, direction: Direction, window: float | None = None
) -> float:
    """Return the FLOPs of causal attention: two products forward, five backward, over the visible pairs of tokens.

    Args:
        width: query channels, heads x head size.
    """
    visible = min(window or sequence, sequence)
    pairs = visible * (2 * sequence - visible) / 2
    return (2 if direction == "forward" else 5) * 2.0 * pairs * width * batch
