"""linear_cross_entropy in chunks of tokens: cuBLAS for the products, a Triton kernel between them, gradients in the forward."""

import torch
import torch.distributed as dist
import triton

from .. import triton_support  # noqa: F401 - repairs Triton's interpreter where that is what runs
from .reference import ranks_of
from .triton_kernels import losses_kernel, scale_kernel, statistics_kernel

CHUNK_BYTES = 2**30  # what a chunk's logits may take, or a little more
BLOCK, WARPS = 8192, 16  # columns of one step of a row's program


def chunk_size(tokens: int, width: int, bytes_a_logit: int) -> int:
    """Tokens of a chunk: even chunks, a multiple of 128 tokens each, whose logits take about CHUNK_BYTES at most."""
    chunks = triton.cdiv(tokens * width * bytes_a_logit, CHUNK_BYTES)
    return min(tokens, 128 * triton.cdiv(tokens, 128 * chunks))


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, summed in fp32 whatever a, b and out hold."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # torch has no such product on a CPU
        y = a.to(out.dtype) @ b.to(out.dtype)
        out.add_(y) if add else out.copy_(y)


def _scale(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, add: bool = False) -> torch.Tensor:
    """out = scale * x (or += it) by a scalar on the device, computed in fp32."""
    grid = (triton.cdiv(x.numel(), 4096),)
    scale_kernel[grid](x, out, scale, x.numel(), ADD=add, IN_PLACE=x is out, BLOCK=4096, num_warps=8)
    return out


class _Chunks:
    """What is the same for all chunks of a call."""

    def __init__(self, weight, true_vocab_size, z_loss_weight, group, tokens, gradient):
        rank, self.ranks = ranks_of(group)
        self.group, self.tokens, self.gradient, self.z_loss_weight = group, tokens, gradient, z_loss_weight
        self.width = weight.shape[0]
        self.start = rank * self.width
        self.columns = min(max(true_vocab_size - self.start, 0), self.width)
        self.block = min(BLOCK, triton.next_power_of_2(self.width))

    def losses(self, logits, dlogits, labels, mask, losses) -> None:
        """Fill losses [2, rows] and, where gradients are wanted, dlogits [rows, width]."""
        rows, statistics = len(logits), logits
        sizes = dict(BLOCK=self.block, num_warps=WARPS)
        if self.ranks > 1:
            mine = torch.empty(3, rows, device=logits.device, dtype=torch.float32)
            statistics_kernel[(rows,)](logits, labels, mine, rows, self.start, self.columns, self.width, **sizes)
            statistics = mine.new_empty(self.ranks * 3, rows)
            dist.all_gather_into_tensor(statistics, mine, group=self.group)
        losses_kernel[(rows,)](
            logits, dlogits, labels, mask, statistics, losses, rows, self.start, self.columns, self.width,
            losses.stride(0), self.tokens, self.z_loss_weight, RANKS=self.ranks, GRADIENT=self.gradient, **sizes,
        )  # fmt: skip


def _forward(hidden, weight, labels, mask, wants, fp32_logits, chunk_tokens, **of_chunks):
    """Means [2] and the gradients that `wants` (of hidden, of weight) asks for: hidden's dtype and fp32."""
    tokens, width, hidden_size = len(hidden), *weight.shape
    logits_dtype = torch.float32 if fp32_logits else hidden.dtype
    size = min(chunk_tokens or chunk_size(tokens, width, logits_dtype.itemsize), tokens)
    chunks = _Chunks(weight, tokens=tokens, gradient=any(wants), **of_chunks)
    logits_of_chunk = torch.empty(size, width, device=hidden.device, dtype=logits_dtype)
    dlogits_of_chunk = logits_of_chunk
    if any(wants) and hidden.dtype != logits_dtype:
        dlogits_of_chunk = torch.empty_like(logits_of_chunk, dtype=hidden.dtype)
    losses = torch.empty(2, tokens, device=hidden.device, dtype=torch.float32)
    dhidden = torch.empty_like(hidden) if wants[0] else None
    dweight = hidden.new_empty(width, hidden_size, dtype=torch.float32) if wants[1] else None
    for first in range(0, tokens, size):
        part = slice(first, min(first + size, tokens))
        logits, dlogits = (x[: part.stop - first] for x in (logits_of_chunk, dlogits_of_chunk))
        _product(hidden[part], weight.t(), logits)
        chunks.losses(logits, dlogits, labels[part], mask[part], losses[:, part])
        if wants[0]:
            _product(dlogits, weight, dhidden[part])
        if wants[1]:
            _product(dlogits.t(), hidden[part], dweight, add=first > 0)
    return losses.sum(1) / tokens, dhidden, dweight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, mask, buffer, wants, options):
        means, *ctx.gradients = _forward(hidden, weight, labels, mask, wants, **options)
        ctx.buffer, ctx.weight_dtype = buffer, weight.dtype
        cross_entropy, z = means.unbind()
        loss = cross_entropy + options["z_loss_weight"] * z
        ctx.mark_non_differentiable(cross_entropy, z)
        return loss, cross_entropy, z

    @staticmethod
    def backward(ctx, grad, *_):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradients are handed over once; run the forward pass again")
        (dhidden, dweight), ctx.gradients = ctx.gradients, None
        if dhidden is not None:
            _scale(dhidden, grad, dhidden)
        if dweight is not None and ctx.buffer is not None:
            _scale(dweight, grad, ctx.buffer, add=True)
            dweight = None
        elif dweight is not None:
            same = ctx.weight_dtype == dweight.dtype
            dweight = _scale(dweight, grad, dweight if same else torch.empty_like(dweight, dtype=ctx.weight_dtype))
        return dhidden, dweight, None, None, None, None, None


@torch.compiler.disable(reason="two matrix products a chunk and in-place gradients: nothing for a compiler to fuse")
def linear_cross_entropy_triton(hidden, weight, labels, loss_mask, *, grad_weight_buffer=None, **options):
    """Arguments and results: `linear_cross_entropy`, of hidden [n, h], labels and loss_mask [n]."""
    hidden, weight = hidden.contiguous(), weight.contiguous()
    wants = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    loss, cross_entropy, z = _LinearCrossEntropy.apply(
        hidden, weight, labels, loss_mask, grad_weight_buffer, wants, options
    )
    return loss, cross_entropy, z
