"""What a forward pass keeps for its backward pass, and what the backward pass needs beside it, by layer kind.

The table to edit when a layer changes. Each operation of a layer is a row, in the order of the forward pass; everything is in
bytes a token of the micro-batch on one rank. `e` is an element's bytes, `w` the rank's widths; what lies on the residual
stream is `/t` under sequence parallelism (`share`). Sources: Transformer Engine 2.20's save_for_backward calls
(layernorm_linear.py, linear.py, backends.py), megatron-core's fused SwiGLU, and hybrid_kernels' autograd functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Literal

from megatron_hybrid.arch.model import LayerKind
from megatron_hybrid.planner.plan import Plan, Widths

Recompute = Literal["none", "selective", "full"]
CHUNK = 64
"""Tokens of a chunk of the delta rule."""
LOGITS_CHUNK_BYTES = 2**30
"""What linear_cross_entropy holds of the logits at a time."""


@dataclass(frozen=True)
class Op:
    """One operation's rows of the table, bytes a token."""

    name: str
    saved: float
    """Kept until its backward pass, beyond what an operation before it keeps anyway."""
    gradient: float
    """Of its inputs, which its backward pass writes."""
    extra: float = 0.0
    """What its backward pass needs besides, while it runs."""
    again: bool = False
    """Selective recompute runs it again, with those beside it; the first of them keeps its input."""
    input: float = 0.0
    """Of that first one: the input that stays."""
    keeps_input: float = 0.0
    """Of `saved`, its input as it is: not kept where selective recompute makes that again. (An FP8 cast of it is.)"""


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer and micro-batch, bytes a token."""

    saved: float
    """Kept between forward and backward pass."""
    transient: float
    """The most that its backward pass needs at any time beyond `saved`; what it frees on the way is counted."""


@dataclass(frozen=True)
class Setting:
    """What a layer's bytes depend on besides its widths."""

    element: int
    share: float
    """Of the residual stream that a rank holds: 1 / t under sequence parallelism."""
    gathered: bool
    """Whether the linears gather their input over the tensor parallel ranks."""
    fp8: bool
    fp8_attention: bool
    transformer_engine: bool
    context: int = 1
    """Context parallel ranks."""
    slice_length: int = 0
    """Tokens of a sequence on each of several."""
    dummies: float = 1.0
    """Heads that they attend with, for each of theirs."""

    @classmethod
    def of(cls, plan: Plan) -> "Setting":
        split = plan.parallel.sequence_parallel_on
        return cls(
            plan.element,
            1 / plan.tp if split else 1.0,
            split,
            plan.precision.fp8_recipe is not None,
            plan.precision.fp8_attention,
            plan.transformer_engine,
            *((plan.cp, plan.slice_length, plan.dummies) if plan.cp > 1 else ()),
        )

    @property
    def linear_input(self) -> float:
        """Bytes of an element that a linear keeps for its weight's gradient: FP8 keeps the transposed cast alone."""
        return 1.0 if self.fp8 else float(self.element)


def layer_ops(kind: LayerKind, w: Widths, of: Setting) -> list[Op]:
    """A layer's operations, first to last."""
    mixer = _gdn_ops(w, of) if kind == "G" else _attention_ops(w, of)
    pre_norm = kind == "G"
    return [*mixer, *_mlp_ops(w, of, pre_norm)]


def _gdn_ops(w: Widths, of: Setting) -> list[Op]:
    e, key, value, heads = of.element, w.gdn_key, w.gdn_value, w.gdn_heads
    scores = heads * (2 * e * CHUNK + 4)  # A and P [64, 64] of every chunk, G
    states = e * value * w.key_head_dim / CHUNK  # every chunk's incoming state, and its gradient
    kept, exchanged = _states_of_slices(w, of)
    return [
        *_norm_linear(w, of, "in_proj", w.gdn_packed),
        # the gate is a view of its input, which it keeps for its own recomputation
        Op("conv_gates", e * w.gdn_packed, e * w.gdn_packed, again=True, input=e * w.gdn_packed),
        Op(
            "delta rule",
            e * (2 * key + value) + 8 * heads + scores + kept,
            e * (2 * key + value) + 8 * heads,
            extra=2 * states + e * value + 4 * heads * -(-w.key_head_dim // CHUNK) + exchanged,
            again=True,
        ),
        Op("gated norm", e * value, 2 * e * value, again=True),
        _row_linear(w, of, "out_proj", value),
    ]


def _states_of_slices(w: Widths, of: Setting) -> tuple[float, float]:
    """A slice's state before it, its own end and its transition, and what all ranks' are when they are exchanged: fp32, a
    sequence, hence so much a token."""
    if of.context == 1:
        return 0.0, 0.0
    columns = w.gdn_value + w.gdn_heads * CHUNK * -(
        -w.key_head_dim // CHUNK
    )  # of ends, with their transitions beside them
    rows = 4 * w.key_head_dim / of.slice_length
    return rows * (w.gdn_value + columns), rows * (of.context + 1) * (w.gdn_value + w.gdn_heads * w.key_head_dim)


def _attention_ops(w: Widths, of: Setting) -> list[Op]:
    e, qkv = of.element, w.q + 2 * w.kv
    kept = of.dummies * ((qkv + w.q) * (1 if of.fp8_attention else e) + 4 * w.heads)
    # the output is the next linear's input: that keeps its own cast of it where it is FP8, or a copy in another layout
    shared = not of.fp8 and not of.fp8_attention and of.transformer_engine and of.context == 1
    sent = of.dummies * e * qkv if of.context > 1 else 0.0  # what an exchange sends beside what it receives
    fp32_copies = 0.0 if of.transformer_engine else 8 * w.heads
    return [
        _column_linear(w, of, "qkv", qkv),
        Op("QK norm, RoPE", e * qkv + 8, e * qkv, extra=fp32_copies),
        Op("attention", kept, e * qkv, extra=of.dummies * (4 * w.q + 4 * w.heads) + sent),  # cuDNN sums dq in fp32
        _row_linear(w, of, "o_proj", w.q, saved=0.0 if shared else of.linear_input * w.q),
        _norm(w, of, "post-norm"),
    ]


def _mlp_ops(w: Widths, of: Setting, pre_norm: bool) -> list[Op]:
    e = of.element
    first = _norm_linear(w, of, "fc1", 2 * w.ffn) if pre_norm else [_column_linear(w, of, "fc1", 2 * w.ffn)]
    last = [] if pre_norm else [_norm(w, of, "post-norm")]
    return [
        *first,
        Op("SwiGLU", 2 * e * w.ffn, 2 * e * w.ffn, again=True, input=2 * e * w.ffn),
        _row_linear(w, of, "fc2", w.ffn),
        *last,
    ]


def _norm_linear(w: Widths, of: Setting, name: str, out: float) -> list[Op]:
    """RMSNorm and a column-parallel linear: the residual stream, and the norm's output as the linear's input."""
    local_norm = 0.0 if of.transformer_engine or of.element == 4 else 4 * w.hidden * of.share  # an fp32 copy
    linear = _column_linear(w, of, name, out)
    norm = Op(f"{name}: norm", of.share * (of.element * w.hidden + 4) + local_norm, of.element * w.hidden * of.share)
    return [norm, linear]


def _column_linear(w: Widths, of: Setting, name: str, out: float) -> Op:
    """Its input is kept as it lies on this rank, and gathered again for the weight's gradient."""
    e, h = of.element, w.hidden
    gathered = (of.linear_input + e) * h if of.gathered else 0.0  # input, and the gradient before it is scattered
    casts = 2 * out if of.fp8 else 0.0  # of the output's gradient, both ways
    return Op(name, of.linear_input * h * of.share, e * h * of.share, extra=gathered + casts)


def _row_linear(w: Widths, of: Setting, name: str, inner: float, saved: float | None = None) -> Op:
    gathered = of.element * w.hidden if of.gathered else 0.0
    casts = 2 * w.hidden if of.fp8 else 0.0
    kept = of.linear_input * inner if saved is None else saved
    return Op(name, kept, of.element * inner, extra=gathered + casts, keeps_input=0.0 if of.fp8 else kept)


def _norm(w: Widths, of: Setting, name: str) -> Op:
    kept = of.element if of.transformer_engine else 4  # torch's runs on an fp32 copy
    return Op(name, of.share * (kept * w.hidden + 4), of.element * w.hidden * of.share)


@lru_cache(maxsize=4096)
def layer_bytes(kind: LayerKind, w: Widths, of: Setting, recompute: Recompute) -> LayerBytes:
    """What a layer keeps, and the most its backward pass needs beyond that."""
    ops, residual = layer_ops(kind, w, of), of.element * w.hidden * of.share
    if recompute == "selective":
        ops = _selective(ops)
    saved = sum(op.saved for op in ops)
    peak = backward_peak(ops, residual)
    if recompute == "full":  # the layer's input alone is kept, and the whole layer is there again for its backward pass
        return LayerBytes(residual, peak - residual)
    return LayerBytes(saved, peak - saved)


def backward_peak(ops: Sequence[Op], residual: float) -> float:
    """The most bytes a token at any time of a layer's backward pass, all that the layer keeps included.

    Args:
        residual: of the residual stream's gradient, which waits beside each sublayer's.
    """
    left, incoming, peak = sum(op.saved for op in ops), residual, 0.0
    for op in reversed(ops):
        peak = max(peak, left + residual + incoming + op.gradient + op.extra)
        left, incoming = left - op.saved, op.gradient
    return peak


def _selective(ops: list[Op]) -> list[Op]:
    """The operations between two linears that run again, as one: it keeps its first one's input, and has all of theirs while it
    runs. The linear behind them has its input back by then."""
    joined: list[Op] = []
    for again, group in groupby(ops, key=lambda op: op.again):
        inside = list(group)
        if not again:
            if joined:
                inside[0] = replace(inside[0], saved=inside[0].saved - inside[0].keeps_input)
            joined += inside
            continue
        kept = inside[0].input
        peak = backward_peak(inside, 0.0)
        joined.append(Op("recomputed", kept, inside[0].gradient, extra=peak - kept - inside[0].gradient))
    return joined


@dataclass(frozen=True)
class HeadBytes:
    """Of the last stage's final norm, output layer and losses; whole bytes of a micro-batch."""

    saved: float
    """From the forward pass to the backward pass, which follows at once: gradients of hidden and of the weight."""
    logits: float
    """A chunk's, while the forward pass runs."""


def head_bytes(plan: Plan) -> HeadBytes:
    """linear_cross_entropy makes the gradients in its forward pass; the logits are never there as a whole."""
    of, w, tokens = Setting.of(plan), plan.widths, plan.tokens
    norm = _norm(w, of, "final norm").saved * tokens
    hidden = of.element * w.hidden * tokens
    gathered = hidden if of.gathered else of.element * w.hidden * of.share * tokens
    logits = min(of.element * w.vocab * tokens, LOGITS_CHUNK_BYTES)
    return HeadBytes(norm + hidden + 4 * w.vocab * w.hidden, logits + gathered)
