"""Cross-entropy and z-loss over a vocabulary that tensor parallel ranks share."""

import torch
import torch.distributed as dist


class _VocabParallelLosses(torch.autograd.Function):
    """Per token: -log softmax(logits)[label], and logsumexp(logits) squared."""

    @staticmethod
    def forward(ctx, logits, labels, true_vocab_size, group):
        rank, ranks = group.rank(), group.size()
        start, width = rank * logits.shape[-1], logits.shape[-1]
        logits = logits.float()
        padding = start + width - true_vocab_size
        if padding > 0:  # dummy rows take no part in the softmax
            logits = logits.clone()
            logits[..., max(0, width - padding) :] = float("-inf")

        largest = logits.amax(-1)
        if ranks > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exponentials = torch.exp(logits - largest.unsqueeze(-1))
        local = labels - start
        here = (local >= 0) & (local < width)
        local = torch.where(here, local, 0)
        label_logit = torch.where(here, logits.gather(-1, local.unsqueeze(-1)).squeeze(-1) - largest, 0.0)
        sums = torch.stack((exponentials.sum(-1), label_logit))
        if ranks > 1:
            dist.all_reduce(sums, group=group)
        log_sum = sums[0].log()
        log_z = log_sum + largest
        softmax = exponentials.div_(sums[0].unsqueeze(-1))
        ctx.save_for_backward(softmax, local, here, log_z)
        return log_sum - sums[1], log_z.square()

    @staticmethod
    def backward(ctx, grad_loss, grad_z):
        softmax, local, here, log_z = ctx.saved_tensors
        grad = softmax * (grad_loss + 2 * log_z * grad_z).unsqueeze(-1)
        grad.scatter_add_(-1, local.unsqueeze(-1), torch.where(here, -grad_loss, 0.0).unsqueeze(-1))
        return grad, None, None, None


def vocab_parallel_losses(
    logits: torch.Tensor, labels: torch.Tensor, true_vocab_size: int, group
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and z-loss of each token, in nats and nats squared, both fp32 and differentiable.

    Args:
        logits: [..., padded vocabulary / ranks], this rank's slice; computed with in fp32.
        labels: [...] int64 over the whole vocabulary, below true_vocab_size.
        true_vocab_size: columns at or beyond it are padding.
        group: the tensor parallel group; two all-reduces of a few numbers a token.

    Returns:
        cross_entropy [...] and logsumexp(logits) ** 2 [...].
    """
    return _VocabParallelLosses.apply(logits, labels, true_vocab_size, group)
