"""The oracle of `linear_cross_entropy` in plain torch: all logits at once, autograd, any device, fp32 inside (fp64 for fp64)."""

import torch
import torch.distributed as dist


class _SumOverRanks(torch.autograd.Function):
    """Sum over a group's ranks, all of which go on to the same scalar: each keeps the gradient of its own addend."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GradientIntoBuffer(torch.autograd.Function):
    """The identity; the gradient is added to a buffer and ends there."""

    @staticmethod
    def forward(ctx, weight, buffer):
        ctx.buffer = buffer
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        ctx.buffer += grad
        return None, None


def ranks_of(group) -> tuple[int, int]:
    """(rank, size) of a process group; None is one rank."""
    return (0, 1) if group is None else (group.rank(), group.size())


def linear_cross_entropy_torch(
    hidden, weight, labels, loss_mask, *, true_vocab_size, z_loss_weight, group=None, grad_weight_buffer=None
):
    """See `hybrid_kernels.linear_cross_entropy.linear_cross_entropy`, whose arguments and results these are."""
    rank, ranks = ranks_of(group)
    width, compute = weight.shape[0], torch.float64 if hidden.dtype == torch.float64 else torch.float32
    start = rank * width
    if grad_weight_buffer is not None:
        weight = _GradientIntoBuffer.apply(weight, grad_weight_buffer)
    column = torch.arange(start, start + width, device=hidden.device)
    logits = hidden.to(compute) @ weight.to(compute).t()
    logits = logits.masked_fill(column >= true_vocab_size, float("-inf"))  # dummy rows take no part in the softmax

    largest = logits.detach().amax(-1)
    if ranks > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    here = (labels >= start) & (labels < start + width)
    label_logit = logits.gather(-1, torch.where(here, labels - start, 0).unsqueeze(-1)).squeeze(-1)
    sums = torch.stack(((logits - largest.unsqueeze(-1)).exp().sum(-1), torch.where(here, label_logit, 0.0)))
    if ranks > 1:
        sums = _SumOverRanks.apply(sums, group)
    log_z = sums[0].log() + largest
    losses = torch.stack((log_z - sums[1], log_z.square()))
    cross_entropy, z = (losses * loss_mask).sum(-1) / loss_mask.numel()
    return cross_entropy + z_loss_weight * z, cross_entropy.detach(), z.detach()
