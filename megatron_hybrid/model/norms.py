"""RMSNorm over the hidden width, before a layer's linears or after a row-parallel one."""

import torch
import torch.nn.functional as F
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
