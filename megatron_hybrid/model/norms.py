"""RMSNorm in the three places a hybrid model has it: over the hidden width, after a row-parallel linear, and over the
whole q and k projections that tensor parallel ranks share.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import nn


def _ones(size: int, config) -> nn.Parameter:
    return nn.Parameter(torch.ones(size, device=torch.cuda.current_device(), dtype=config.params_dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 inside.

    megatron-core's WrappedTorchNorm refuses sequence parallelism; this one marks its weight, whose gradient is then
    summed over the tensor parallel ranks with the other norms'.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__()
        self.eps = eps
        self.weight = _ones(hidden_size, config)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)
        return y.to(x.dtype)


class RowParallelLinearWithNorm(nn.Module):
    """A row-parallel linear followed by RMSNorm: the end of a post-norm sublayer.

    The norm runs on what the linear leaves on this rank: its share of the tokens under sequence parallelism.
    """

    def __init__(self, input_size: int, output_size: int, *, linear: type, norm: type, config, **kwargs):
        super().__init__()
        self.linear = linear(input_size, output_size, config=config, **kwargs)
        self.norm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        y, _ = self.linear(x)
        return self.norm(y), None

    def backward_dw(self) -> None:
        self.linear.backward_dw()


class _SumOverRanks(torch.autograd.Function):
    """Sum over a group's ranks, each of which goes on with the sum in its own way: gradients are summed as well."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class QKNorm(nn.Module):
    """RMSNorm over the whole q projection and over the whole k projection, before the split into heads.

    Args:
        true_widths: of q and k over all ranks, without dummy heads: what the mean squares are over.
        local_widths: of q and k on this rank, dummy heads included (their entries are zero).
        group: the tensor parallel group; one all-reduce of two numbers a token joins the ranks' sums of squares.

    Source: transformers `Olmo3Attention`.
    """

    def __init__(self, config, true_widths: tuple[int, int], local_widths: tuple[int, int], eps: float, group):
        super().__init__()
        self.true_widths, self.eps, self.group = true_widths, eps, group
        self.q_weight, self.k_weight = (_ones(width, config) for width in local_widths)
        for weight in (self.q_weight, self.k_weight):  # so that the gradient norm counts every rank's part
            set_tensor_model_parallel_attributes(weight, True, 0, 1)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [..., local q width], k [..., local k width] -> the same, normalised."""
        q32, k32 = q.float(), k.float()
        squares = torch.stack((q32.square().sum(-1), k32.square().sum(-1)))
        if self.group.size() > 1:
            squares = _SumOverRanks.apply(squares, self.group)
        widths = squares.new_tensor(self.true_widths).view(2, *(1,) * (squares.dim() - 1))
        scale_q, scale_k = torch.rsqrt(squares / widths + self.eps).unsqueeze(-1)
        return (q32 * scale_q * self.q_weight.float()).to(q.dtype), (k32 * scale_k * self.k_weight.float()).to(k.dtype)
