"""The fast paths of gated_delta_rule: which kernels run in which order, forward and backward, and what is kept between.

Forward: prepare (chunk-parallel), then one scan that also writes o. Backward: what was not saved again, the reverse
scan, then one chunk-parallel kernel for dq, dk, dg and dbeta. Every sum has a fixed order.

Few heads leave most of the GPU idle, for a scan is a chain: then sequences are cut into segments (`segments_of`). A first,
lighter scan of each finds what it does alone, `join` the state it starts from, and the second scan runs all at once.

Slices of sequences on several ranks (`group`) go the same way, with an exchange (../slices.py) between the two scans.
"""

from functools import partial

import torch

from ..slices import fold, fold_back, gradient_after, product, state_before
from . import triton_op
from .triton_join import join
from .triton_op import Chunks, Scores, gradients

SAVED = 7  # tensors of `Saved`, each of which may be missing


def _scans(hopper: bool):
    """The module whose scans to launch."""
    if hopper:
        from . import gluon_op

        return gluon_op
    return triton_op


def modules(q, v, cu_seqlens, hopper: bool):
    """Whose `prepare` runs, whose scans for more than final states, and over how many segments of a sequence: on Hopper those in
    CUDA C++ where they pay, whose scans have the bits of the others and take sequences whole."""
    first, scans = triton_op, _scans(hopper)
    if hopper:
        from . import cuda_op

        if cuda_op.missing(q, v, cu_seqlens) is None:
            first = cuda_op
            if cuda_op.slower_scans(q, v) is None:
                return first, cuda_op, 1
    return first, scans, triton_op.segments_of(v, q.shape[3], cu_seqlens)


def _alone(scans, q, k, v, scores, initial, scale, chunks, last, group):
    """First pass over segments: where each starts, the final state if asked for, and each one's end and transition."""
    ends = scans.forward_scan(q, k, v, scores, None, None, scale, chunks, final=True, transition=True)[1]
    if group is not None:
        parts, moves = _by_segment(ends, k, v, chunks)
        initial = state_before(fold(parts, moves), product(moves), group)
    if chunks.segments == 1:
        return initial, None, ends
    starts, final = join(
        ends, ends, initial, _state_shape(k, v), chunks.segments, reverse=False, last=last
    )  # fmt: skip
    return starts, final, ends


def _alone_backward(scans, q, k, v, do, scores, ends, dfinal, scale, chunks, last, group):
    """First pass in reverse: the gradient of each segment's final state, and that of the initial one if asked for."""
    alone = scans.reverse_scan(q, k, do, scores, None, None, scale, chunks, output=False, initial=True)[2]
    if group is not None:
        moves = _by_segment(ends, k, v, chunks)[1]
        first = fold_back(alone.unflatten(0, (-1, chunks.segments)).transpose(0, 1), moves)
        dfinal = gradient_after(first, product(moves), group)
    if chunks.segments == 1:
        return dfinal, None
    return join(alone, ends, dfinal, _state_shape(k, v), chunks.segments, reverse=True, last=last)


def _by_segment(ends, k, v, chunks):
    """Ends [segments, b, H, K, V] and transitions [segments, b, H, K, K] of a first pass."""
    by_segment = ends.unflatten(0, (-1, chunks.segments)).transpose(0, 1)
    return by_segment[..., : v.shape[3]], by_segment[..., v.shape[3] : v.shape[3] + k.shape[3]]


def _state_shape(k, v):
    return v.shape[0], v.shape[2], k.shape[3], v.shape[3]


def forward(
    q, k, v, g, beta, initial, cu_seqlens, scale: float, output_final: bool, save: str, hopper: bool, group=None
):
    """o, the final state or None, and what `backward` wants: A, P, G, states, new values, segments' starts and ends."""
    scans, (first, full, segments) = _scans(hopper), modules(q, v, cu_seqlens, hopper)
    chunks = Chunks.of(v, cu_seqlens, segments)
    scores = first.prepare(q, k, g, beta, scale, chunks, cu_seqlens is not None)
    cut, starts, ends, final = segments > 1 or group is not None, None, None, None
    if cut:
        starts, final, ends = _alone(scans, q, k, v, scores, initial, scale, chunks, output_final, group)
    o, end, kept = full.forward_scan(
        q, k, v, scores, starts if cut else initial, cu_seqlens, scale, chunks, output=True,
        final=output_final and not cut, states=save == "states",
    )  # fmt: skip
    between = (None,) * 5 if save == "inputs" else (scores.A, scores.P, scores.G, starts, ends)
    return o, final if cut else end, (*between[:3], *kept, *between[3:])


def backward(q, k, v, g, beta, initial, cu_seqlens, saved, do, dfinal, scale: float, hopper: bool, group=None):
    """dq, dk, dv, dg, dbeta and dinitial (None without an initial state)."""
    A, P, G, states, new_values, starts, ends = saved
    scans, (first, full, segments) = _scans(hopper), modules(q, v, cu_seqlens, hopper)
    chunks, varlen = Chunks.of(v, cu_seqlens, segments), cu_seqlens is not None
    scores, cut = Scores(A, P, G), segments > 1 or group is not None
    if A is None:
        scores = first.prepare(q, k, g, beta, scale, chunks, varlen)
    if cut and ends is None:
        starts, _, ends = _alone(scans, q, k, v, scores, initial, scale, chunks, False, group)
    if states is None:
        begin = starts if cut else initial
        states, new_values = full.forward_scan(q, k, v, scores, begin, cu_seqlens, scale, chunks, states=True)[2]
    dinitial = None
    if cut:
        dfinal, dinitial = _alone_backward(
            scans, q, k, v, do, scores, ends, dfinal, scale, chunks, initial is not None, group
        )
    dv, dstates, dbegin = full.reverse_scan(
        q, k, do, scores, dfinal, cu_seqlens, scale, chunks, initial=initial is not None and not cut
    )
    dq, dk, dg, dbeta = gradients(
        q, k, g, beta, do, dv, scores.G, states, new_values, dstates, scale, chunks, varlen
    )  # fmt: skip
    return dq, dk, dv, dg, dbeta, dinitial if cut else dbegin


class GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, cu_seqlens, scale, output_final, save, hopper, group):
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        initial = initial if initial is None else initial.contiguous()
        run = _forward_op if torch.compiler.is_compiling() else partial(forward, group=group)
        o, final, saved = run(q, k, v, g, beta, initial, cu_seqlens, scale, output_final, save, hopper)
        ctx.save_for_backward(q, k, v, g, beta, initial, cu_seqlens, *saved)
        ctx.scale, ctx.hopper, ctx.group = scale, hopper, group
        if not torch.compiler.is_compiling():  # which knows no such thing
            ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, g, beta, initial, cu_seqlens, *saved = ctx.saved_tensors
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = dfinal if dfinal is None else dfinal.contiguous()
        run = _backward_op if torch.compiler.is_compiling() else partial(backward, group=ctx.group)
        *grads, dinitial = run(q, k, v, g, beta, initial, cu_seqlens, saved, do, dfinal, ctx.scale, ctx.hopper)
        if dinitial is not None:
            dinitial = dinitial.to(initial.dtype)
        return *grads, dinitial, None, None, None, None, None, None


def gated_delta_rule_triton(
    q, k, v, g, beta, *, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, save="scores",
    hopper=False, group=None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Arguments and results: `gated_delta_rule`."""
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    save = save if torch.is_grad_enabled() else "inputs"
    run = GatedDeltaRule.apply if group is None else _between_ranks
    return run(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, save, hopper, group)


@torch.compiler.disable(reason="a process group is no argument of an operator")
def _between_ranks(*args):
    return GatedDeltaRule.apply(*args)


# What torch.compile sees: two operators it does not look into. They return tensors alone: empty ones for what is missing.


@torch.library.custom_op("hybrid_kernels::gated_delta_rule_forward", mutates_args=())
def _forward_opaque(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None, scale: float, output_final: bool, save: str,
    hopper: bool,
) -> list[torch.Tensor]:  # fmt: skip
    o, final, saved = forward(q, k, v, g, beta, initial, cu_seqlens, scale, output_final, save, hopper)
    return [v.new_empty(0) if x is None else x for x in (o, final, *saved)]


@_forward_opaque.register_fake
def _(q, k, v, g, beta, initial, cu_seqlens, scale, output_final, save, hopper):
    batch, length, heads, dim_v = v.shape
    dim_k, segments = k.shape[3], modules(q, v, cu_seqlens, hopper)[2]
    n = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    count = batch * -(-length // 64) if cu_seqlens is None else length // 64 + min(n, length)
    chunks = Chunks(batch * segments, length, count, v, v, v, segments)
    out = [torch.empty_like(v)] + [v.new_empty(0) for _ in range(1 + SAVED)]
    if output_final:
        out[1] = v.new_empty(n, heads, dim_k, dim_v, dtype=torch.float32)
    if save != "inputs":
        scores = Scores.empty(k, heads, count)
        out[2:5] = [scores.A, scores.P, scores.G]
        if segments > 1:
            out[7:9] = [triton_op.ends_like(v, dim_k, chunks, wider) for wider in (False, True)]
    if save == "states":
        out[5:7] = chunks.states_like(v, dim_k)
    return out


def _forward_op(*args):
    o, *rest = (x if x.numel() else None for x in _forward_opaque(*args))
    return o, rest[0], rest[1:]


@torch.library.custom_op("hybrid_kernels::gated_delta_rule_backward", mutates_args=())
def _backward_opaque(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor,
    initial: torch.Tensor | None, cu_seqlens: torch.Tensor | None, saved: list[torch.Tensor], do: torch.Tensor,
    dfinal: torch.Tensor | None, scale: float, hopper: bool,
) -> list[torch.Tensor]:  # fmt: skip
    saved = [x if x.numel() else None for x in saved]
    grads = backward(q, k, v, g, beta, initial, cu_seqlens, saved, do, dfinal, scale, hopper)
    return [v.new_empty(0) if x is None else x for x in grads]


@_backward_opaque.register_fake
def _(q, k, v, g, beta, initial, cu_seqlens, saved, do, dfinal, scale, hopper):
    dinitial = v.new_empty(0) if initial is None else torch.empty_like(initial, dtype=torch.float32)
    return [*(torch.empty_like(x) for x in (q, k, v, g, beta)), dinitial]


def _backward_op(q, k, v, g, beta, initial, cu_seqlens, saved, do, dfinal, scale, hopper):
    saved = [v.new_empty(0) if x is None else x for x in saved]
    grads = _backward_opaque(q, k, v, g, beta, initial, cu_seqlens, saved, do, dfinal, scale, hopper)
    return (*grads[:5], grads[5] if initial is not None else None)
