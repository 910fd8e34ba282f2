"""Context parallelism of the gated delta rule: ranks exchange states instead of tokens.

A slice maps the state S before it to M S + E after it, with its final state E [K, V] from zero and its transition M [K, K]
(hybrid_kernels/gated_delta_rule/states.py). A first, lighter scan finds both. One all-gather of [K, V + K] per head follows, and
each rank folds what the ranks before it have contributed. The backward pass does the same in the other direction.
flash-linear-attention passes states between ranks in the same way (its fla/ops/cp/KCP.md).

With documents, the scan forgets the state at each boundary. Then M is zero for a slice that contains a boundary, E is the final
state of its last document alone, and S reaches its first document alone. The exchange does not know about documents.

All ranks call these functions in the same order. Slices may differ in length.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from hybrid_kernels.custom_op import OptionalTensors, eager_only
from hybrid_kernels.dispatch import Choice
from hybrid_kernels.documents import check_positions
from hybrid_kernels.gated_delta_rule import FAST, check_save, choose_backend, explain, gated_delta_rule
from hybrid_kernels.gated_delta_rule.reference import final_state_and_transition
from hybrid_kernels.gated_delta_rule.states import fold, fold_backward
from megatron_hybrid.distributed import context_parallel


def gated_delta_rule_of_slices(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    positions_bs: torch.Tensor | None = None,
    scale: float | None = None,
    save: str = "scores",
    backend: str | None = None,
) -> torch.Tensor:
    """Return o of `gated_delta_rule` for this rank's slice of every sequence. Differentiable.

    Args:
        group: ranks that hold one slice each of every sequence, in rank order.
        positions_bs: position of each token of the slice in its document, which may have begun in a slice before: `positions` of
            `slice_starts` (documents.py). The transition of a slice with a boundary is exactly zero.

    Other arguments: those of `gated_delta_rule`. Slices exclude the caller's own initial states.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
    """
    if group.size() == 1:
        options: dict[str, Any] = dict(scale=scale, save=save, backend=backend)
        return gated_delta_rule(q, k, v, g, beta, positions_bs=positions_bs, **options)[0]
    check_save(save)
    check_positions(positions_bs, *v.shape[:2])
    choice = choose_backend(q, v, backend, positions_bs is not None, sliced=True)
    if choice.backend in FAST:
        scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
        save = save if torch.is_grad_enabled() else "inputs"
        return _apply_fast(q, k, v, g, beta, positions_bs, scale, save, choice.backend, group)
    ends = final_state_and_transition(k, v, g, beta, positions_bs)
    initial = differentiable_state_before(ends, v.shape[-1], group)
    return gated_delta_rule(
        q, k, v, g, beta, scale=scale, initial_state=initial, positions_bs=positions_bs, backend=choice.backend
    )[0]


def explain_gated_delta_rule_of_slices(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    group: dist.ProcessGroup,
    documents: bool = False,
    backend: str | None = None,
) -> Choice:
    """Return which backend `gated_delta_rule_of_slices` would run, and why. `documents`: with positions_bs."""
    choice = explain(q, k, v, g, beta, documents=documents, sliced=group.size() > 1, backend=backend)
    return in_slices(choice, group)


def in_slices(choice: Choice, group: dist.ProcessGroup) -> Choice:
    """Return a choice with a reason that says that ranks pass states on, if there are several."""
    if group.size() == 1:
        return choice
    return replace(
        choice, reason=f"{choice.reason}, each sequence in slices on {group.size()} ranks, which pass states on"
    )


# ---- exchange of states


def state_before(end: torch.Tensor, transition: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the state before this rank's slice, from its final state from zero [..., K, V] and its transition [..., K, K]."""
    width, before = end.shape[-1], group.rank()
    parts = context_parallel.all_gather(torch.cat((end, transition), -1), group)[:before]
    return fold(parts[..., :width], parts[..., width:]) if before else torch.zeros_like(end)


def gradient_after(first: torch.Tensor, transition: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the gradient of the state after this rank's slice.

    Args:
        first: [..., K, V], the gradient of the state before it where the state after it has none.
        transition: [..., K, K].
    """
    width, after = first.shape[-1], group.rank() + 1
    parts = context_parallel.all_gather(torch.cat((first, transition), -1), group)[after:]
    return fold_backward(parts[..., :width], parts[..., width:]) if len(parts) else torch.zeros_like(first)


def differentiable_state_before(ends: torch.Tensor, width: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `state_before` of ends [..., K, V + K], with V = `width`: the final state from zero, and behind it the transition."""
    state: torch.Tensor = _StateBefore.apply(ends, width, group)  # type: ignore[no-untyped-call]
    return state


class _StateBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ends: torch.Tensor, width: int, group: dist.ProcessGroup) -> torch.Tensor:
        state = state_before(ends[..., :width], ends[..., width:], group)
        ctx.save_for_backward(ends[..., width:], state)
        ctx.group = group
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        transition, state = ctx.saved_tensors
        after = gradient_after(grads[0], transition, ctx.group)
        return torch.cat((after, torch.matmul(after, state.mT)), -1), None, None


# ---- fast backends: the exchange is between the two passes of each direction


def forward_of_slice(
    inputs: tuple[torch.Tensor, ...],
    positions: torch.Tensor | None,
    scale: float,
    save: str,
    backend: str,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor, OptionalTensors]:
    """Return o, the state before the slice, and the tensors that `backward_of_slice` takes. All inputs are contiguous."""
    from hybrid_kernels.gated_delta_rule import passes  # needs Triton

    call = passes.Call.of(inputs, None, positions, scale, backend)
    scores, ends = passes.start_forward(call, sliced=True)
    assert ends is not None
    initial = state_before(*passes.end_and_transition(call, ends), group)
    o, _, kept = passes.finish_forward(call, scores, ends, initial, False, save)
    return o, initial, kept.tensors()


def backward_of_slice(
    inputs: tuple[torch.Tensor, ...],
    positions: torch.Tensor | None,
    initial: torch.Tensor,
    kept: OptionalTensors,
    do: torch.Tensor,
    scale: float,
    backend: str,
    group: dist.ProcessGroup,
) -> OptionalTensors:
    """Return the gradients of q, k, v, g and beta."""
    from hybrid_kernels.gated_delta_rule import passes

    call = passes.Call.of(inputs, None, positions, scale, backend)
    complete, firsts = passes.start_backward(call, passes.Kept.of(kept), initial, do, sliced=True)
    assert complete.ends is not None and firsts is not None
    dfinal = gradient_after(*passes.first_and_transition(call, complete.ends, firsts), group)
    return passes.finish_backward(call, complete, firsts, do, dfinal, with_initial=False)[:5]


class _DeltaRuleOfSlice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        positions: torch.Tensor | None,
        scale: float,
        save: str,
        backend: str,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        inputs = tuple(x.contiguous() for x in (q, k, v, g, beta))
        positions = positions if positions is None else positions.contiguous()
        o, initial, kept = forward_of_slice(inputs, positions, scale, save, backend, group)
        ctx.save_for_backward(*inputs, positions, initial, *kept)
        ctx.scale, ctx.backend, ctx.group = scale, backend, group
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, positions, initial = ctx.saved_tensors[:7]
        do, kept = grads[0].contiguous(), list(ctx.saved_tensors[7:])
        of_inputs = backward_of_slice(tuple(inputs), positions, initial, kept, do, ctx.scale, ctx.backend, ctx.group)
        return *of_inputs, None, None, None, None, None


@eager_only
def _apply_fast(*args: Any) -> torch.Tensor:
    o: torch.Tensor = _DeltaRuleOfSlice.apply(*args)  # type: ignore[no-untyped-call]
    return o
