"""Initial weights, the same under every layout: each true tensor is drawn whole from a generator of its own, seeded by its
name, and a rank takes its slice.

Values follow OLMo-core: normal with the model's std for matrices, embeddings and convolutions; ones for norms; A_log and
dt_bias as in Mamba2.
"""

import hashlib
import math

import torch

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.tensors import TensorSpec
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.precision.fp8_parameters import initial_values


def initial_value(spec: TensorSpec, model: ModelConfig, seed: int) -> torch.Tensor:
    """The whole tensor in fp32 on the CPU."""
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(spec.shape, dtype=torch.float32)
    if spec.kind == "norm":
        return value.fill_(1.0)
    if spec.kind == "A_log":
        assert model.gdn is not None
        low, high = model.gdn.a_init_range
        return value.uniform_(low, high, generator=generator).clamp_(min=1e-4).log_()
    if spec.kind == "dt_bias":
        assert model.gdn is not None
        low, high = (math.log(x) for x in model.gdn.dt_init_range)
        dt = value.uniform_(low, high, generator=generator).exp_().clamp_(min=model.gdn.dt_init_floor)
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    return value.normal_(0.0, model.init_std, generator=generator)


@torch.no_grad()
def initialize(chunks, layout: ParamLayout, seed: int) -> None:
    """Fill this rank's parameters. Padding becomes zero, for good."""
    for _, parameter, pieces in layout.parameters(chunks):
        values = initial_values(parameter)
        values.zero_()
        for piece in pieces:
            box = initial_value(piece.tensor, layout.model, seed)
            for dim, (start, length) in enumerate(zip(piece.offset, piece.shape, strict=True)):
                box = box.narrow(dim, start, length)
            piece.view(values).copy_(box)
