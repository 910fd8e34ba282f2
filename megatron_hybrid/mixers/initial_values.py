"""Draw initial values of a tensor by its kind, as OLMo-core does."""

import math

import torch

from megatron_hybrid.arch.model import GatedDeltaNetConfig
from megatron_hybrid.arch.tensors import TensorKind


def draw(
    value: torch.Tensor,
    kind: TensorKind,
    std: float,
    gdn: GatedDeltaNetConfig | None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Fill the fp32 tensor `value` with initial values of a tensor of this kind, and return it.

    Args:
        std: standard deviation of matrices, embeddings and convolutions.
        gdn: the ranges of A_log and dt_bias. None: the tensor is another.
        generator: None: torch's current one of the tensor's device.
    """
    if kind == "norm":
        return value.fill_(1.0)
    if kind == "A_log":
        assert gdn is not None
        low, high = gdn.a_init_range
        return value.uniform_(low, high, generator=generator).clamp_(min=1e-4).log_()
    if kind == "dt_bias":
        assert gdn is not None
        low, high = (math.log(x) for x in gdn.dt_init_range)
        dt = value.uniform_(low, high, generator=generator).exp_().clamp_(min=gdn.dt_init_floor)
        return value.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    return value.normal_(0.0, std, generator=generator)
