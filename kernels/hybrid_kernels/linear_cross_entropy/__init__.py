"""linear_cross_entropy: from the last hidden states to the loss, without materialising all logits."""

import torch

from hybrid_kernels.collectives import VocabParallel
from hybrid_kernels.dispatch import Choice, choose, triton_unsupported_reason
from hybrid_kernels.linear_cross_entropy.reference import linear_cross_entropy_torch

__all__ = ["explain", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    true_vocab_size: int,
    z_loss_weight: float,
    vocab_parallel: VocabParallel | None = None,
    chunk_tokens: int | None = None,
    fp32_logits: bool = True,
    grad_weight_buffer: torch.Tensor | None = None,
    token_losses: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mean cross-entropy plus the weighted mean z-loss of logits = hidden @ weight^T.

    Means are over all tokens, masked or not: sum(mask * x) / mask.numel(). The Triton backend iterates over chunks of tokens and
    computes the gradients of hidden and weight in the forward pass, while it holds a chunk's logits. The backward pass scales
    these gradients by the incoming gradient; it can run once. Without gradient mode, none are computed.

    Args:
        hidden: [..., h] fp32 or bf16, the same on every tensor parallel rank (gathered over sequence parallel ranks).
        weight: [V / ranks, h] in hidden's dtype: this rank's rows of the padded vocabulary V, in rank order.
        labels: [...] int64 in the whole vocabulary. Where the mask is 0 they may have any value, such as -100.
        loss_mask: [...] fp32, the weight of each token.
        true_vocab_size: rows of the whole vocabulary from this one on are padding and are ignored.
        z_loss_weight: weight of the z-loss, the mean of logsumexp(logits)^2.
        vocab_parallel: this rank's part of the vocabulary; None: all of it. Triton calls `all_gather` once per chunk, on three
            numbers per token. The reference calls `all_reduce_max` and `all_reduce_sum` once each.
        chunk_tokens: tokens per chunk; None: as many as keep a chunk's logits within 1 GiB. Triton only.
        fp32_logits: False keeps a chunk's logits in hidden's dtype, which is a few percent faster. In bf16 a logit of 16 then has
            an error of up to 1/16, losses of single tokens of 1e-2, and gradients of 1%. (With fp32 logits: 1e-6, and 0.2% from
            rounding the logits' gradients for the GEMMs.) Triton only; the reference always uses fp32.
        grad_weight_buffer: fp32, shaped as weight (Megatron's `main_grad`). The backward pass adds weight's gradient to it,
            unrounded. Autograd sees no gradient of weight, so weight.grad does not change.
        token_losses: shaped as loss_mask. Receives the weighted cross-entropy of each token; no gradient passes through it.

    Returns:
        The loss, a differentiable fp32 scalar; the mean cross-entropy in nats and the unweighted mean z-loss, both detached.
        The gradient of hidden is this rank's part. The caller sums it over the ranks, as the backward pass of a gather or copy
        to the tensor parallel region does.

    Raises:
        ValueError: the shapes or dtypes do not match, or the requested backend cannot run here.
    """
    _check(hidden, weight, labels, loss_mask, chunk_tokens, grad_weight_buffer, token_losses)
    choice = explain(hidden, weight, backend=backend)
    per_token = None if token_losses is None else token_losses.view(-1)
    tensors = hidden.flatten(0, -2), weight, labels.reshape(-1), loss_mask.reshape(-1), grad_weight_buffer, per_token
    if choice.backend == "triton":
        from hybrid_kernels.linear_cross_entropy.backends.triton.op import Options, linear_cross_entropy_triton

        options = Options(true_vocab_size, z_loss_weight, vocab_parallel, chunk_tokens, fp32_logits)
        return linear_cross_entropy_triton(*tensors, options)
    return linear_cross_entropy_torch(*tensors, true_vocab_size, z_loss_weight, vocab_parallel)


def explain(hidden: torch.Tensor, weight: torch.Tensor, *, backend: str | None = None) -> Choice:
    """Return which backend a call would run, and why."""
    backends = {"triton": lambda: triton_unsupported_reason(hidden, weight), "torch": lambda: None}
    return choose("linear_cross_entropy", backends, backend)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    chunk_tokens: int | None,
    buffer: torch.Tensor | None,
    token_losses: torch.Tensor | None,
) -> None:
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight: expected [vocabulary / ranks, h] for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if hidden.dtype == torch.float16:
        raise ValueError("hidden: float16 cannot hold gradients of single logits (1e-9 and less); use bfloat16")
    for name, t in (("labels", labels), ("loss_mask", loss_mask)):
        if t.shape != hidden.shape[:-1]:
            raise ValueError(f"{name}: expected {tuple(hidden.shape[:-1])}, got {tuple(t.shape)}")
    if token_losses is not None and (token_losses.shape != loss_mask.shape or not token_losses.is_contiguous()):
        raise ValueError(f"token_losses: expected contiguous {tuple(loss_mask.shape)}, got {tuple(token_losses.shape)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected a positive number of tokens, got {chunk_tokens}")
    if buffer is not None and (buffer.shape != weight.shape or buffer.dtype not in (torch.float32, torch.float64)):
        raise ValueError(
            f"grad_weight_buffer: expected float32 {tuple(weight.shape)}, got {buffer.dtype} {tuple(buffer.shape)}"
        )
