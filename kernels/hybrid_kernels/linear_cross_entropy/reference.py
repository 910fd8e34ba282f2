"""Oracle of `linear_cross_entropy` in plain torch: all logits at once, autograd, any device, in fp32 or, for fp64 inputs, fp64."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hybrid_kernels.collectives import AllReduce, VocabParallel


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks that all compute the same scalar from it: each keeps the gradient of its own addend."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, all_reduce: AllReduce) -> torch.Tensor:
        x = x.clone()
        all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _GradientIntoBuffer(torch.autograd.Function):
    """Identity. The backward pass adds the gradient to a buffer and returns none."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        ctx.buffer = buffer
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        ctx.buffer += grads[0]
        return None, None


def linear_cross_entropy_torch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    grad_weight_buffer: torch.Tensor | None,
    token_losses: torch.Tensor | None,
    true_vocab_size: int,
    z_loss_weight: float,
    vocab_parallel: VocabParallel | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `hybrid_kernels.linear_cross_entropy.linear_cross_entropy`."""
    width, compute = weight.shape[0], torch.float64 if hidden.dtype == torch.float64 else torch.float32
    start = 0 if vocab_parallel is None else vocab_parallel.rank * width
    if grad_weight_buffer is not None:
        weight = _GradientIntoBuffer.apply(weight, grad_weight_buffer)
    column = torch.arange(start, start + width, device=hidden.device)
    logits = hidden.to(compute) @ weight.to(compute).t()
    logits = logits.masked_fill(column >= true_vocab_size, float("-inf"))  # the softmax ignores padding rows

    largest = logits.detach().amax(-1)
    if vocab_parallel is not None:
        vocab_parallel.all_reduce_max(largest)
    here = (labels >= start) & (labels < min(start + width, true_vocab_size))
    label_logit = logits.gather(-1, torch.where(here, labels - start, 0).unsqueeze(-1)).squeeze(-1)
    sums = torch.stack(((logits - largest.unsqueeze(-1)).exp().sum(-1), torch.where(here, label_logit, 0.0)))
    if vocab_parallel is not None:
        sums = _SumOverRanks.apply(sums, vocab_parallel.all_reduce_sum)
    log_z = sums[0].log() + largest
    losses = torch.stack((log_z - sums[1], log_z.square())) * loss_mask
    if token_losses is not None:
        token_losses.copy_(losses[0].detach())
    cross_entropy, z = losses.sum(-1) / loss_mask.numel()
    return cross_entropy + z_loss_weight * z, cross_entropy.detach(), z.detach()
