"""What ranks exchange that hold a slice each of the same sequences, in rank order. Any device, fp32 or fp64.

A recurrence hands on its state, not its tokens. A slice takes the state S that it starts from to M S + E, with E [K, V] its
final state after starting from zero and M [K, K] its transition. In the other direction, the gradient D of its final state
becomes M^T D + F, with F that of its initial state where its final one has none. So every rank says E and M, or F and M, and
folds those of the ranks on one side of it: one all-gather of [K, V + K] a head in each direction. flash-linear-attention passes
states between ranks in the same way (its fla/ops/cp/KCP.md).

Every rank calls each of these, in the same order; the autograd functions are in every rank's graph, the first's and last's too.
"""

from functools import reduce

import torch
import torch.distributed as dist


def several(group):
    """The group where it has more than one rank, else None."""
    return None if group is None or group.size() == 1 else group


def gather(x: torch.Tensor, group) -> torch.Tensor:
    """[ranks, *x.shape]: x of every rank."""
    every = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(every.flatten(0, 1), x.contiguous(), group=group)
    return every


def from_previous(x: torch.Tensor, group) -> torch.Tensor:
    """x of the rank before this one; zeros on the first."""
    every = gather(x, group)
    return every[group.rank() - 1] if group.rank() else torch.zeros_like(x)


def from_next(x: torch.Tensor, group) -> torch.Tensor:
    """x of the rank after this one; zeros on the last."""
    every = gather(x, group)
    return every[group.rank() + 1] if group.rank() + 1 < group.size() else torch.zeros_like(x)


class FromPrevious(torch.autograd.Function):
    """`from_previous`, differentiable."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return from_previous(x, group)

    @staticmethod
    def backward(ctx, grad):
        return from_next(grad, ctx.group), None


def fold(ends, moves) -> torch.Tensor:
    """S <- M S + E one after the other, from zero; contiguous. ends [n, ..., K, V], moves [n, ..., K, K], n at least 1."""
    state = ends[0].contiguous()
    for end, move in zip(ends[1:], moves[1:], strict=True):
        state = torch.matmul(move, state) + end
    return state


def fold_back(firsts, moves) -> torch.Tensor:
    """D <- M^T D + F from the last to the first, from zero. firsts [n, ..., K, V], moves [n, ..., K, K]."""
    return fold(firsts.flip(0), moves.flip(0).mT)


def product(moves) -> torch.Tensor:
    """The transition of all in one: moves[-1] ... moves[0]."""
    return reduce(lambda so_far, move: torch.matmul(move, so_far), moves)


def state_before(end: torch.Tensor, move: torch.Tensor, group) -> torch.Tensor:
    """The state that this rank's slice starts from.

    Args:
        end: [..., K, V], its final state after starting from zero. move: [..., K, K], its transition.
    """
    width, before = end.shape[-1], group.rank()
    every = gather(torch.cat((end, move), -1), group)[:before]
    return fold(every[..., :width], every[..., width:]) if before else torch.zeros_like(end)


def gradient_after(first: torch.Tensor, move: torch.Tensor, group) -> torch.Tensor:
    """The gradient of the state that this rank's slice ends in.

    Args:
        first: [..., K, V], the gradient of its initial state where its final one has none. move: [..., K, K].
    """
    width, after = first.shape[-1], group.rank() + 1
    every = gather(torch.cat((first, move), -1), group)[after:]
    return fold_back(every[..., :width], every[..., width:]) if len(every) else torch.zeros_like(first)


class StateBefore(torch.autograd.Function):
    """`state_before` of ends [..., K, V + K], the final state from zero beside the transition; differentiable."""

    @staticmethod
    def forward(ctx, ends, width, group):
        state = state_before(ends[..., :width], ends[..., width:], group)
        ctx.save_for_backward(ends[..., width:], state)
        ctx.group = group
        return state

    @staticmethod
    def backward(ctx, first):
        move, state = ctx.saved_tensors
        after = gradient_after(first, move, ctx.group)
        return torch.cat((after, torch.matmul(after, state.mT)), -1), None, None
