"""Passes of the fast backends: the order of the launches in each direction, and what is kept between them.

Forward: `prepare` (parallel over chunks), then one scan that also writes o. Backward: whatever was not saved again, the reverse
scan, then one kernel (parallel over chunks) for dq, dk, dg and dbeta. Every sum has a fixed order.

A scan is sequential, so few heads leave most of the GPU idle. Then sequences are cut into segments. A first, lighter scan of all
segments at once finds their final states from zero and their transitions, `join` computes the state before each segment, and the
second scan of all segments at once writes the results.

Each direction is split in two functions, start and finish. A caller that holds one part of a longer sequence exchanges states
with the other parts between the two (`end_and_transition`, `first_and_transition`); see states.py for the algebra.

Documents in the rows change no launch and no shape, except that of G (backends/triton/prepare.py).
"""

from dataclasses import dataclass, replace

import torch

from hybrid_kernels.custom_op import OptionalTensors
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks, Scores
from hybrid_kernels.gated_delta_rule.backends.triton.join import join
from hybrid_kernels.gated_delta_rule.kernels import Kernels, choose_kernels
from hybrid_kernels.gated_delta_rule.states import compose, fold, fold_backward


@dataclass(frozen=True)
class Call:
    """Inputs of one call, contiguous, and the kernels that run it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    cu_seqlens: torch.Tensor | None
    scale: float
    kernels: Kernels
    chunks: Chunks

    @classmethod
    def of(
        cls,
        inputs: tuple[torch.Tensor, ...],
        cu_seqlens: torch.Tensor | None,
        positions: torch.Tensor | None,
        scale: float,
        backend: str,
    ) -> "Call":
        q, k, v, g, beta = inputs
        kernels = choose_kernels(backend, q, v, cu_seqlens)
        chunks = Chunks.of(v, cu_seqlens, kernels.segments, positions)
        return cls(q, k, v, g, beta, cu_seqlens, scale, kernels, chunks)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """[b, heads, K, V]."""
        return self.v.shape[0], self.v.shape[2], self.k.shape[3], self.v.shape[3]

    @property
    def in_segments(self) -> bool:
        return self.kernels.segments > 1

    def prepare(self) -> Scores:
        varlen = self.cu_seqlens is not None
        scores: Scores = self.kernels.scans.prepare(self.q, self.k, self.g, self.beta, self.scale, self.chunks, varlen)
        return scores

    def first_scan(self, scores: Scores) -> torch.Tensor:
        """Return each segment's final state from zero, and its transition behind it: [segments, heads, K, V + K or more]."""
        ends: torch.Tensor = self.kernels.scans.forward_scan(
            self.q, self.k, self.v, scores, None, None, self.scale, self.chunks, final=True, transition=True
        )[1]
        return ends

    def starts(
        self, ends: torch.Tensor | None, initial: torch.Tensor | None, last: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the states before each segment, and the final state if it is requested and there are several segments."""
        if not self.in_segments:
            return initial, None
        assert ends is not None
        return join(ends, ends, initial, self.state_shape, self.kernels.segments, reverse=False, last=last)

    def by_segment(self, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the result of `first_scan` into ends [segments, b, heads, K, V] and transitions [segments, b, heads, K, K]."""
        parts = ends.unflatten(0, (-1, self.kernels.segments)).transpose(0, 1)
        *_, key_dim, value_dim = self.state_shape
        return parts[..., :value_dim], parts[..., value_dim : value_dim + key_dim]


@dataclass(frozen=True)
class Kept:
    """Tensors that the forward pass leaves to the backward pass. Each part may be missing; the backward pass then recomputes it."""

    scores: Scores | None = None
    states: torch.Tensor | None = None
    new_values: torch.Tensor | None = None
    starts: torch.Tensor | None = None
    """State before each segment, where there are several."""
    ends: torch.Tensor | None = None
    """Result of `Call.first_scan`, where there was one."""

    def tensors(self) -> OptionalTensors:
        scores = (None, None, None) if self.scores is None else (self.scores.A, self.scores.P, self.scores.G)
        return [*scores, self.states, self.new_values, self.starts, self.ends]

    @classmethod
    def of(cls, tensors: OptionalTensors) -> "Kept":
        A, P, G, *others = tensors
        scores = None if A is None or P is None or G is None else Scores(A, P, G)
        return cls(scores, *others)


def start_forward(call: Call, sliced: bool = False) -> tuple[Scores, torch.Tensor | None]:
    """Return the scores and, for segments or for one slice of a longer sequence, the result of the first scan."""
    scores = call.prepare()
    return scores, call.first_scan(scores) if sliced or call.in_segments else None


def end_and_transition(call: Call, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the final state from zero [b, heads, K, V] and the transition [b, heads, K, K] of this call's tokens."""
    parts, transitions = call.by_segment(ends)
    return fold(parts, transitions), compose(transitions)


def finish_forward(
    call: Call,
    scores: Scores,
    ends: torch.Tensor | None,
    initial: torch.Tensor | None,
    output_final: bool,
    save: str,
) -> tuple[torch.Tensor, torch.Tensor | None, Kept]:
    """Return o, the final state if requested, and what the backward pass needs."""
    starts, final = call.starts(ends, initial, output_final)
    o, end, (states, new_values) = call.kernels.scans.forward_scan(
        call.q, call.k, call.v, scores, starts, call.cu_seqlens, call.scale, call.chunks, output=True,
        final=output_final and not call.in_segments, states=save == "states",
    )  # fmt: skip
    kept = Kept()
    if save != "inputs":
        kept = Kept(scores, states, new_values, starts if call.in_segments else None, ends)
    return o, final if call.in_segments else end, kept


def start_backward(
    call: Call, kept: Kept, initial: torch.Tensor | None, do: torch.Tensor, sliced: bool = False
) -> tuple[Kept, torch.Tensor | None]:
    """Return `kept` with what was missing and, for segments or one slice of a longer sequence, the first reverse scan's result.

    That result is the gradient of each segment's initial state where its final state has none.
    """
    scores = call.prepare() if kept.scores is None else kept.scores
    starts, ends = kept.starts, kept.ends
    cut = sliced or call.in_segments
    if cut and ends is None:
        ends = call.first_scan(scores)
    if starts is None:
        starts, _ = call.starts(ends, initial, last=False)
    states, new_values = kept.states, kept.new_values
    if states is None:
        states, new_values = call.kernels.scans.forward_scan(
            call.q, call.k, call.v, scores, starts, call.cu_seqlens, call.scale, call.chunks, states=True
        )[2]
    firsts = None
    if cut:
        firsts = call.kernels.scans.reverse_scan(
            call.q, call.k, do, scores, None, None, call.scale, call.chunks, output=False, initial=True
        )[2]
    return replace(kept, scores=scores, states=states, new_values=new_values, ends=ends), firsts


def first_and_transition(call: Call, ends: torch.Tensor, firsts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the initial state for a final state without one, and the transition, of this call's tokens."""
    transitions = call.by_segment(ends)[1]
    by_segment = firsts.unflatten(0, (-1, call.kernels.segments)).transpose(0, 1)
    return fold_backward(by_segment, transitions), compose(transitions)


def finish_backward(
    call: Call,
    kept: Kept,
    firsts: torch.Tensor | None,
    do: torch.Tensor,
    dfinal: torch.Tensor | None,
    with_initial: bool,
) -> OptionalTensors:
    """Return dq, dk, dv, dg, dbeta, and the gradient of the initial state if `with_initial`."""
    assert kept.scores is not None and kept.states is not None and kept.new_values is not None
    dinitial = None
    if call.in_segments:
        assert firsts is not None and kept.ends is not None
        dfinal, dinitial = join(
            firsts, kept.ends, dfinal, call.state_shape, call.kernels.segments, reverse=True, last=with_initial
        )
    dv, dstates, dbegin = call.kernels.scans.reverse_scan(
        call.q, call.k, do, kept.scores, dfinal, call.cu_seqlens, call.scale, call.chunks,
        initial=with_initial and not call.in_segments,
    )  # fmt: skip
    dq, dk, dg, dbeta = call.kernels.scans.gradients(
        call.q, call.k, call.g, call.beta, do, dv, kept.scores.G, kept.states, kept.new_values, dstates, call.scale,
        call.chunks, call.cu_seqlens is not None,
    )  # fmt: skip
    return [dq, dk, dv, dg, dbeta, dinitial if call.in_segments else dbegin]
