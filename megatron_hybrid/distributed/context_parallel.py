"""Context parallelism: each rank of a group holds one contiguous slice of every sequence, in rank order.

Gated DeltaNet passes its state from slice to slice (state_passing.py), and its convolution a halo of a few tokens. Attention
exchanges tokens for heads as DeepSpeed-Ulysses does (arXiv 2309.14509): while it attends, each rank holds whole sequences of some
heads. So any attention kernel works, and under the causal mask all ranks have the same work. All other layers work token by token.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megatron_hybrid.base.errors import UserError

# ---- halo of a convolution


def all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return x of every rank, [ranks, *x.shape]."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=group)
    return gathered


def from_previous(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return x of the previous rank; zeros on the first rank."""
    gathered = all_gather(x, group)
    return gathered[group.rank() - 1] if group.rank() else torch.zeros_like(x)


def from_next(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return x of the next rank; zeros on the last rank."""
    gathered = all_gather(x, group)
    return gathered[group.rank() + 1] if group.rank() + 1 < group.size() else torch.zeros_like(x)


class _WithHalo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_sbw: torch.Tensor, count: int, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.count, ctx.group = count, group
        return x_sbw.view_as(x_sbw), from_previous(x_sbw[-count:], group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        dx, dhalo = grads
        # in place, because a copy of a gradient as wide as in_proj's output would cost as much as the convolution; the op that
        # takes x and the halo writes dx for this function alone
        dx[-ctx.count :] += from_next(dhalo, ctx.group)
        return dx, None, None


def with_halo(x_sbw: torch.Tensor, count: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return x and its halo: the last `count` tokens of the previous rank's slice, [count, b, w]. Differentiable.

    The halo is zero on the first rank, and None in a group of one rank. Both results must go to one op (`conv_gates`), on every
    rank.

    Raises:
        UserError: the slice is shorter than the halo of the next rank.
    """
    if group.size() == 1:
        return x_sbw, None
    if len(x_sbw) < count:
        raise UserError(
            f"sequence_length: a slice of {len(x_sbw)} tokens is shorter than the {count} that the next slice's convolution looks "
            "back on; use longer sequences or fewer context parallel ranks"
        )
    x, halo = _WithHalo.apply(x_sbw, count, group)  # type: ignore[no-untyped-call]
    return x, halo


# ---- attention


class _AllToAll(torch.autograd.Function):
    """Send entry r of x [ranks, ...] to rank r; entry r of the result comes from rank r."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, x = group, x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(grads[0], ctx.group), None


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    received: torch.Tensor = _AllToAll.apply(x, group)  # type: ignore[no-untyped-call]
    return received


class HeadExchange:
    """Exchange of all heads of a slice's tokens for some heads of all tokens, and back.

    Args:
        group: the context parallel ranks.
        heads: query heads of a rank before the exchange.
        groups: key/value heads of a rank before the exchange. If the ranks do not divide them, dummy heads are exchanged as
            well: zeros that attend to zeros. No parameter holds them.
    """

    def __init__(self, group: dist.ProcessGroup, heads: int, groups: int) -> None:
        self.group, self.ranks, self.before = group, group.size(), heads
        self.groups = -(-groups // self.ranks)
        self.heads = self.groups * (heads // groups)

    def to_heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Exchange x [s / ranks, b, n, d] for [s, b, heads, d]. n is at most ranks * heads."""
        if self.ranks == 1:
            return x
        dummies = self.ranks * heads - x.shape[2]
        if dummies:
            x = F.pad(x, (0, 0, 0, dummies))
        by_rank = x.unflatten(2, (self.ranks, heads)).permute(2, 0, 1, 3, 4)
        return _all_to_all(by_rank, self.group).flatten(0, 1)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange x [s, b, heads * d] for [s / ranks, b, n * d], with the n query heads of before."""
        if self.ranks == 1:
            return x
        by_head = _all_to_all(x.unflatten(0, (self.ranks, -1)), self.group).permute(1, 2, 0, 3).flatten(2)
        return by_head[..., : x.shape[2] // self.heads * self.before].contiguous()
