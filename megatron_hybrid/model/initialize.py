"""Initial weights, the same under every layout: each true tensor is drawn whole from a generator of its own, seeded by its
name, and a rank takes its slice.

Values follow OLMo-core: normal with the model's std for matrices, embeddings and convolutions; ones for norms; A_log and
dt_bias as in Mamba2.
"""

import hashlib

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import TensorSpec
from megatron_hybrid.mixers.initial_values import draw
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.precision.fp8_parameters import initial_values


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
