"""Sizes that tensor parallelism needs a little larger than the model has them, and what is left of them on each rank.

Padding is exact: dummy heads have zero weights, give zero output and receive zero gradient, so they stay zero, and
checkpoints do not hold them. Dummy vocabulary rows are masked out of the softmax.
"""

from dataclasses import dataclass
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import FP8_ALIGNMENT, round_up


def padded_groups(groups: int, members: int, tensor_parallel_size: int) -> tuple[int, int]:
    """Return the padded (groups, members). Groups are padded, and each brings its share of members, so that groups stay whole.

    Groups are key/value heads with their query heads, or Gated DeltaNet's key heads with their value heads.
    """
    padded = round_up(groups, tensor_parallel_size)
    return padded, padded * (members // groups)


@dataclass(frozen=True)
class PaddedSizes:
    """Padded totals over all tensor parallel ranks; each divides by `tensor_parallel_size`."""

    tensor_parallel_size: int
    num_attention_heads: int
    num_key_value_heads: int
    gdn_key_heads: int
    gdn_value_heads: int
    vocab_size: int

    @classmethod
    def of(cls, model: ModelConfig, tensor_parallel_size: int) -> "PaddedSizes":
        """Return the sizes of `model`."""
        tp = tensor_parallel_size
        kv, heads = padded_groups(model.kv_heads, model.num_attention_heads, tp)
        gdn_key, gdn_value = 0, 0
        if gdn := model.section("gdn"):
            gdn_key, gdn_value = padded_groups(gdn.num_key_heads, gdn.num_value_heads, tp)  # type: ignore[attr-defined]
        return cls(
            tensor_parallel_size=tp,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            gdn_key_heads=gdn_key,
            gdn_value_heads=gdn_value,
            vocab_size=round_up(model.vocab_size, FP8_ALIGNMENT * tp),
        )


@dataclass(frozen=True)
class PackedWidths:
    """Widths of one rank's Gated DeltaNet in_proj output, in this order. `padding` aligns the total for FP8 and for fast bf16
    kernels."""

    q: int
    k: int
    v: int
    gate: int
    b: int
    a: int
    padding: int

    @classmethod
    def of(cls, model: ModelConfig, tensor_parallel_size: int) -> "PackedWidths":
        """Return the widths of `model`, which has Gated DeltaNet layers."""
        return cls.of_mixer(model.section("gdn"), tensor_parallel_size)

    @classmethod
    def of_mixer(cls, gdn: Any, tensor_parallel_size: int) -> "PackedWidths":
        """Return the widths of a mixer."""
        padded = padded_groups(gdn.num_key_heads, gdn.num_value_heads, tensor_parallel_size)
        key_heads, heads = (count // tensor_parallel_size for count in padded)
        key, value = key_heads * gdn.key_head_dim, heads * gdn.value_head_dim
        used = 2 * (key + value + heads)
        return cls(key, key, value, value, heads, heads, round_up(used, FP8_ALIGNMENT) - used)

    @property
    def conv(self) -> int:
        """Channels of the convolution: q, k and v."""
        return self.q + self.k + self.v

    @property
    def total(self) -> int:
        return self.conv + self.gate + self.b + self.a + self.padding


def true_part(true_size: int, padded_size: int, rank: int, ranks: int) -> tuple[int, int]:
    """(offset, length) of what rank `rank` holds of a dimension of `true_size`, split evenly at `padded_size`.

    The length is shorter, or zero, on the ranks that hold padding.
    """
    share = padded_size // ranks
    start = min(rank * share, true_size)
    return start, min(start + share, true_size) - start
