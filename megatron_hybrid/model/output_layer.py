"""Output layer: from the last hidden states to logits, or to the losses without materializing all logits."""

from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from hybrid_kernels.linear_cross_entropy import linear_cross_entropy
from megatron_hybrid.distributed.collectives import vocab_parallel
from megatron_hybrid.model.predictions import count_correct


class TokenLosses(NamedTuple):
    """Mean losses over the tokens of a micro-batch, masked or not."""

    total: torch.Tensor
    """The differentiated loss: cross-entropy plus weighted z-loss."""
    cross_entropy: torch.Tensor
    """In nats per token, detached."""
    z_loss: torch.Tensor
    """Unweighted, detached."""
    per_token: torch.Tensor
    """Cross-entropy of each token times its loss mask, detached: fp32 [s, b]."""
    correct: torch.Tensor | None
    """Number of tokens in the loss whose label has the highest logit: fp64 scalar. None: not counted."""


class _GradientIsInMainGrad(torch.autograd.Function):
    """Identity on a weight whose gradient a kernel adds to `main_grad`: tells DDP so and triggers its hook."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> torch.Tensor:
        ctx.weight.grad_added_to_main_grad = True
        return torch.empty_like(ctx.weight)  # never read


class OutputLayer(ColumnParallelLinear):
    """megatron-core's output layer, which can also return losses.

    It stays a module of its own, so that DDP's forward hook waits for its weight.
    """

    def forward(
        self,
        x_sbh: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        count: bool = False,
        **loss_options: Any,
    ) -> tuple[torch.Tensor, None] | TokenLosses:
        """Return logits, or the losses of labels.

        Args:
            x_sbh: [s, b, h], this rank's tokens under sequence parallelism.
            weight: the embedding's weight if it is shared; None: this layer's own.
            labels, loss_mask: [s, b].
            count: also count correct predictions.
            loss_options: options of hybrid_kernels.linear_cross_entropy.

        Returns:
            (logits [s, b, vocabulary / tp], None); with labels, the TokenLosses.
        """
        if labels is None or loss_mask is None:
            return super().forward(x_sbh, weight=weight, runtime_gather_output=runtime_gather_output)
        group, buffer = self.tp_group, None
        if self.sequence_parallel:
            x_sbh = gather_from_sequence_parallel_region(x_sbh, group=group)
        else:
            x_sbh = copy_to_tensor_model_parallel_region(x_sbh, group=group)
        if weight is None:  # a shared one gets a gradient from the embedding as well, by autograd
            weight = self.weight
            buffer = getattr(weight, "main_grad", None) if torch.is_grad_enabled() else None
            if buffer is not None:
                weight = _GradientIsInMainGrad.apply(weight)
        correct = None
        if count:
            size = loss_options["true_vocab_size"]
            correct = count_correct(x_sbh, weight, labels, loss_mask, size, vocab_parallel(group))
        per_token = torch.empty(loss_mask.shape, dtype=torch.float32, device=loss_mask.device)
        losses = linear_cross_entropy(
            x_sbh,
            weight,
            labels.contiguous(),
            loss_mask.contiguous(),
            vocab_parallel=vocab_parallel(group),
            grad_weight_buffer=buffer,
            token_losses=per_token,
            **loss_options,
        )
        return TokenLosses(*losses, per_token, correct)
