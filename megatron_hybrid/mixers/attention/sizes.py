"""Sizes and options of one attention mixer, without torch."""

from dataclasses import dataclass
from typing import Literal

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.model_fields import ModelFields, RopeScalingConfig


@dataclass(frozen=True)
class AttentionSizes:
    """True sizes, before tensor parallelism pads them, and the block's options."""

    heads: int
    groups: int
    """Heads of k and v."""
    head_dim: int
    norm_eps: float
    rope_scaling: RopeScalingConfig | None = None
    """YaRN for the layers without a window."""
    qk_norm: Literal["none", "per_head", "projection"] = "projection"
    output_gate: bool = False
    zero_centered_norm: bool = False
    """The norms of q and k multiply by 1 + weight."""

    @classmethod
    def of(cls, model: ModelFields, block: Block) -> "AttentionSizes":
        """Return the sizes of a block in a model of this package."""
        return cls(
            model.num_attention_heads,
            model.kv_heads,
            model.attention_head_dim,
            model.norm_eps,
            model.rope_scaling,
            block.qk_norm,
            block.output_gate,
            model.zero_centered_norm,
        )
