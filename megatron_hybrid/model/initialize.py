"""Initial weights, the same under every layout.

Each true tensor is drawn whole from a generator of its own, seeded by its name, and a rank takes its slice. Mixers and
`arch/layer.py` declare the distributions, which are OLMo-core's.
"""

import hashlib
from collections.abc import Iterable

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import TensorSpec
from megatron_hybrid.mixers.initial_values import draw
from megatron_hybrid.model.param_layout import ParamLayout
from megatron_hybrid.precision.fp8_parameters import initial_values


def initial_value(spec: TensorSpec, model: ModelConfig, seed: int) -> torch.Tensor:
    """Return the whole tensor in fp32 on the CPU."""
    digest = hashlib.sha256(f"{seed}/{spec.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return draw(torch.empty(spec.shape, dtype=torch.float32), spec.init, model.init_std, generator)


@torch.no_grad()
def initialize(chunks: Iterable[torch.nn.Module], layout: ParamLayout, seed: int) -> None:
    """Fill this rank's parameters. Padding becomes zero, permanently."""
    for _, parameter, slices in layout.parameters(chunks):
        values = initial_values(parameter)
        values.zero_()
        for part in slices:
            part.target.narrow(values).copy_(part.source.narrow(initial_value(part.tensor, layout.model, seed)))
