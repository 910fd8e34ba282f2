"""Context parallelism: the ranks of a group hold one slice each of every sequence, contiguous, in rank order.

Gated DeltaNet hands its state on from slice to slice (hybrid_kernels/slices.py). Attention exchanges tokens for heads, after
DeepSpeed-Ulysses (arXiv 2309.14509): each rank has whole sequences of some heads for as long as it attends, so that any
attention will do, and under the causal mask all have the same work. Everything else is done token by token.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F


def slice_of_sequences(x_bs: torch.Tensor, group) -> torch.Tensor:
    """This rank's tokens [b, s / ranks] of x [b, s]."""
    length = x_bs.shape[1] // group.size()
    return x_bs[:, group.rank() * length : (group.rank() + 1) * length]


class _AllToAll(torch.autograd.Function):
    """Entry r of x [ranks, ...] goes to rank r; entry r of the result came from it."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, x = group, x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None


class HeadExchange:
    """From all heads of a slice's tokens to some heads of all tokens, and back.

    Args:
        group: the context parallel ranks.
        heads, groups: query heads and key/value heads that a rank has before. Where the groups do not divide, dummies are
            exchanged with them, zeros that attend to zeros; no parameter holds them.
    """

    def __init__(self, group, heads: int, groups: int):
        self.group, self.ranks, self.before = group, group.size(), heads
        self.groups = -(-groups // self.ranks)
        self.heads = self.groups * (heads // groups)

    def to_heads(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """x [s / ranks, b, n, d] -> [s, b, heads, d], with n at most ranks * heads."""
        if self.ranks == 1:
            return x
        dummies = self.ranks * heads - x.shape[2]
        if dummies:
            x = F.pad(x, (0, 0, 0, dummies))
        by_rank = x.unflatten(2, (self.ranks, heads)).permute(2, 0, 1, 3, 4)
        return _AllToAll.apply(by_rank, self.group).flatten(0, 1)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """x [s, b, heads * d] -> [s / ranks, b, n * d], its n query heads before."""
        if self.ranks == 1:
            return x
        by_head = _AllToAll.apply(x.unflatten(0, (self.ranks, -1)), self.group).permute(1, 2, 0, 3).flatten(2)
        return by_head[..., : x.shape[2] // self.heads * self.before].contiguous()
