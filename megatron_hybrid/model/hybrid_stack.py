"""megatron-core's stack of hybrid layers with a final norm of our choice and a layer spec per block."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

SLOT = "*"
"""megatron-core's symbol for the slot that `one_slot` fills."""


class HybridStackWithNorm(HybridStack):
    """HybridStack whose final norm is `norm`. Its own is hard-coded to Transformer Engine's (hybrid_block.py:215)."""

    def __init__(
        self, config: TransformerConfig, *args: Any, norm: Any, post_layer_norm: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs, post_layer_norm=False)
        self.post_layer_norm = post_layer_norm
        if self.post_process and self.post_layer_norm:
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class _LayerByNumber:
    """Builds a layer from the spec of its number. HybridStack has one slot per kind of layer, for the kinds that it knows."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, layer_number: int, specs: Sequence[ModuleSpec], **arguments: Any
    ) -> torch.nn.Module:
        layer: torch.nn.Module = build_module(
            specs[layer_number - 1], config=config, layer_number=layer_number, **arguments
        )
        return layer


def one_slot(specs: Sequence[ModuleSpec]) -> HybridStackSubmodules:
    """Return the submodules of a stack that has `specs[i]` as its layer i, all in the slot of symbol SLOT."""
    return HybridStackSubmodules(attention_layer=ModuleSpec(module=_LayerByNumber, params=dict(specs=tuple(specs))))
