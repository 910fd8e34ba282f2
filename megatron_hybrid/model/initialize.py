"""Initial weights, the same under every layout: each true tensor is drawn whole from a generator of its own, seeded by its
name, and a rank takes its slice.

Values follow OLMo-core: normal with the model's std for matrices, embeddings and convolutions; ones for norms; A_log and
dt_bias as in Mamba2.
"""

import hashlib
import math

import torch

from megatron_hybrid.config.model import GatedDeltaNetConfig, ModelConfig
from megatron_hybrid.config.tensors import TensorKind, TensorSpec
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.precision.fp8_parameters import initial_values


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


def initial_value(spec: TensorSpec, model: ModelConfig, seed: int) -> torch.Tensor:
    """The whole tensor in fp32 on the CPU."""
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return draw(torch.empty(spec.shape, dtype=torch.float32), spec.kind, model.init_std, model.gdn, generator)


@torch.no_grad()
def initialize(chunks, layout: ParamLayout, seed: int) -> None:
    """Fill this rank's parameters. Padding becomes zero, permanently."""
    for _, parameter, pieces in layout.parameters(chunks):
        values = initial_values(parameter)
        values.zero_()
        for piece in pieces:
            piece.view(values).copy_(piece.of_true(initial_value(piece.tensor, layout.model, seed)))
