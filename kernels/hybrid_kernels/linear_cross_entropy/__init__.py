"""linear_cross_entropy: from the last hidden states to the loss, without ever holding all logits."""

import torch

from ..dispatch import Choice, choose, missing_for_triton
from .reference import linear_cross_entropy_torch

__all__ = ["explain", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    true_vocab_size: int,
    z_loss_weight: float,
    group=None,
    chunk_tokens: int | None = None,
    fp32_logits: bool = True,
    grad_weight_buffer: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy plus weighted mean z-loss of logits = hidden @ weight^T, over a vocabulary that ranks share.

    Means are over all tokens, masked or not: sum(mask * x) / mask.numel(). The Triton backend goes through the tokens
    in chunks and computes the gradients of hidden and weight in the forward pass, while a chunk's logits are at hand;
    the backward pass multiplies them by the gradient it is given, in the pass that hands them over. Where gradients
    are off, none are computed.

    Args:
        hidden: [..., h] fp32 or bf16, the same on every rank of `group` (gathered over sequence parallel ranks).
        weight: [V / ranks, h] in hidden's dtype: this rank's rows of the padded vocabulary V, in rank order.
        labels: [...] int64 over the whole vocabulary; where the mask is 0 they may be anything, -100 say.
        loss_mask: [...] fp32, the weight of each token.
        true_vocab_size: rows of the whole vocabulary at or beyond it are padding and take no part.
        z_loss_weight: weight of the z-loss, the mean of logsumexp(logits)^2.
        group: the torch.distributed group that shares the vocabulary; None: one rank. One small all-gather a chunk.
        chunk_tokens: tokens of a chunk; None: as many as keep a chunk's logits within 1 GiB. Triton only.
        fp32_logits: False keeps a chunk's logits in hidden's dtype: some percent faster, but in bf16 a logit of 16 is off by
            up to 1/16, so the losses of single tokens by 1e-2 and the gradients by 1% (in fp32 by 1e-6 and 0.2%, from
            rounding the logits' gradients for the products). Triton only; the reference always keeps fp32.
        grad_weight_buffer: fp32, shaped as weight (Megatron's `main_grad`). The backward pass adds weight's gradient to
            it, unrounded, and autograd sees no gradient of weight at all: weight.grad stays as it is.

    Returns:
        The loss, a differentiable fp32 scalar; the mean cross-entropy in nats and the mean z-loss (unweighted), detached.
        The gradient of hidden is this rank's part, from its slice of the vocabulary: sum it over the group, as the
        backward pass of a gather or copy to the tensor parallel region does.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or a backend that cannot run here.
    """
    _check(hidden, weight, labels, loss_mask, chunk_tokens, grad_weight_buffer)
    choice = explain(hidden, weight, backend=backend)
    flat = hidden.flatten(0, -2), weight, labels.reshape(-1), loss_mask.reshape(-1)
    options = dict(
        true_vocab_size=true_vocab_size, z_loss_weight=z_loss_weight, group=group, grad_weight_buffer=grad_weight_buffer
    )
    if choice.backend == "triton":
        from .triton_op import linear_cross_entropy_triton

        return linear_cross_entropy_triton(*flat, chunk_tokens=chunk_tokens, fp32_logits=fp32_logits, **options)
    return linear_cross_entropy_torch(*flat, **options)


def explain(hidden: torch.Tensor, weight: torch.Tensor, *_, backend: str | None = None, **__) -> Choice:
    """Which backend a call would run, and why; takes the arguments of `linear_cross_entropy`."""
    backends = {"triton": lambda: missing_for_triton(hidden, weight), "torch": lambda: None}
    return choose("linear_cross_entropy", backends, backend)


def _check(hidden, weight, labels, loss_mask, chunk_tokens, buffer) -> None:
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
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected a positive number of tokens, got {chunk_tokens}")
    if buffer is not None and (buffer.shape != weight.shape or buffer.dtype not in (torch.float32, torch.float64)):
        raise ValueError(
            f"grad_weight_buffer: expected float32 {tuple(weight.shape)}, got {buffer.dtype} {tuple(buffer.shape)}"
        )
