"""Launches and autograd of `linear_cross_entropy` in Triton.

Iterates over chunks of tokens: cuBLAS computes the GEMMs, a Triton kernel runs between them, and the forward pass computes the
gradients.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from hybrid_kernels import triton_support  # noqa: F401 - repairs Triton's interpreter before the kernels are defined
from hybrid_kernels.collectives import VocabParallel
from hybrid_kernels.custom_op import eager_only
from hybrid_kernels.linear_cross_entropy.backends.triton.kernels import losses_kernel, scale_kernel, statistics_kernel

CHUNK_BYTES = 2**30
"""Approximate limit of the logits of one chunk."""
BLOCK, WARPS = 8192, 16
"""Columns per step of a row's program, and its warps."""


def chunk_size(tokens: int, width: int, bytes_per_logit: int) -> int:
    """Return the tokens per chunk: even chunks, multiples of 128 tokens, with logits of at most about CHUNK_BYTES."""
    chunks = -(-tokens * width * bytes_per_logit // CHUNK_BYTES)
    return min(tokens, 128 * -(-tokens // (128 * chunks)))


def _gemm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """Compute out = a @ b, or out += a @ b, accumulating in fp32 whatever the dtypes."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # torch has no such GEMM on a CPU
        y = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(y) if add else out.copy_(y)


def _scale(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, add: bool = False) -> torch.Tensor:
    """Compute out = scale * x, or out += scale * x, in fp32. `scale` is a scalar on the device."""
    grid = (triton.cdiv(x.numel(), 4096),)
    scale_kernel[grid](x, out, scale, x.numel(), ADD=add, IN_PLACE=x is out, BLOCK=4096, num_warps=8)
    return out


@dataclass(frozen=True)
class Options:
    """Arguments of `linear_cross_entropy` that are not tensors."""

    true_vocab_size: int
    z_loss_weight: float
    vocab_parallel: VocabParallel | None
    chunk_tokens: int | None
    fp32_logits: bool


class _Losses:
    """Losses of chunks, and the gradients of their logits."""

    def __init__(self, width: int, tokens: int, gradient: bool, options: Options) -> None:
        self.width, self.tokens, self.gradient = width, tokens, gradient
        self.z_loss_weight, self.others = options.z_loss_weight, options.vocab_parallel
        self.start = 0 if self.others is None else self.others.rank * width
        self.columns = min(max(options.true_vocab_size - self.start, 0), width)
        self.block = min(BLOCK, triton.next_power_of_2(width))

    def compute(
        self,
        logits: torch.Tensor,
        dlogits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
        losses: torch.Tensor,
    ) -> None:
        """Fill losses [2, rows] and, if gradients are wanted, dlogits [rows, width]."""
        rows, statistics, ranks = len(logits), logits, 1
        sizes = dict(BLOCK=self.block, num_warps=WARPS)
        if self.others is not None:
            own, ranks = torch.empty(3, rows, device=logits.device, dtype=torch.float32), self.others.size
            statistics_kernel[(rows,)](logits, labels, own, rows, self.start, self.columns, self.width, **sizes)
            statistics = own.new_empty(ranks * 3, rows)
            self.others.all_gather(statistics, own)
        losses_kernel[(rows,)](
            logits, dlogits, labels, mask, statistics, losses, rows, self.start, self.columns, self.width,
            losses.stride(0), self.tokens, self.z_loss_weight, RANKS=ranks, GRADIENT=self.gradient, **sizes,
        )  # fmt: skip


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    token_losses: torch.Tensor | None,
    wanted: tuple[bool, bool],
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the means [2] and the `wanted` gradients: of hidden in its dtype, of weight in fp32. Fill token_losses."""
    tokens, (width, hidden_size) = len(hidden), weight.shape
    logits_dtype = torch.float32 if options.fp32_logits else hidden.dtype
    size = min(options.chunk_tokens or chunk_size(tokens, width, logits_dtype.itemsize), tokens)
    chunks = _Losses(width, tokens, any(wanted), options)
    logits_of_chunk = torch.empty(size, width, device=hidden.device, dtype=logits_dtype)
    dlogits_of_chunk = logits_of_chunk
    if any(wanted) and hidden.dtype != logits_dtype:
        dlogits_of_chunk = torch.empty_like(logits_of_chunk, dtype=hidden.dtype)
    losses = torch.empty(2, tokens, device=hidden.device, dtype=torch.float32)
    dhidden = torch.empty_like(hidden) if wanted[0] else None
    dweight = hidden.new_empty(width, hidden_size, dtype=torch.float32) if wanted[1] else None
    for first in range(0, tokens, size):
        part = slice(first, min(first + size, tokens))
        logits, dlogits = (x[: part.stop - first] for x in (logits_of_chunk, dlogits_of_chunk))
        _gemm(hidden[part], weight.t(), logits)
        chunks.compute(logits, dlogits, labels[part], mask[part], losses[:, part])
        if dhidden is not None:
            _gemm(dlogits, weight, dhidden[part])
        if dweight is not None:
            _gemm(dlogits.t(), hidden[part], dweight, add=first > 0)
    if token_losses is not None:
        token_losses.copy_(losses[0])
    return losses.sum(1) / tokens, dhidden, dweight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
        buffer: torch.Tensor | None,
        token_losses: torch.Tensor | None,
        wanted: tuple[bool, bool],
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        means, *ctx.gradients = _forward(hidden, weight, labels, mask, token_losses, wanted, options)
        ctx.buffer, ctx.weight_dtype = buffer, weight.dtype
        cross_entropy, z = means.unbind()
        loss = cross_entropy + options.z_loss_weight * z
        ctx.mark_non_differentiable(cross_entropy, z)
        return loss, cross_entropy, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: the backward pass can run once; run the forward pass again")
        (dhidden, dweight), ctx.gradients = ctx.gradients, None
        if dhidden is not None:
            _scale(dhidden, grads[0], dhidden)
        if dweight is not None and ctx.buffer is not None:
            _scale(dweight, grads[0], ctx.buffer, add=True)
            dweight = None
        elif dweight is not None:
            same = ctx.weight_dtype == dweight.dtype
            dweight = _scale(dweight, grads[0], dweight if same else torch.empty_like(dweight, dtype=ctx.weight_dtype))
        return dhidden, dweight, *[None] * 6


@eager_only
def linear_cross_entropy_triton(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    grad_weight_buffer: torch.Tensor | None,
    token_losses: torch.Tensor | None,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `hybrid_kernels.linear_cross_entropy.linear_cross_entropy`; hidden is [n, h], labels and loss_mask are [n]."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    loss, cross_entropy, z = _LinearCrossEntropy.apply(
        hidden, weight, labels, loss_mask, grad_weight_buffer, token_losses, wanted, options
    )
    return loss, cross_entropy, z
