"""Sizes that tensor parallelism needs a little larger than the model has them, and what is left of them on each rank.

Padding is exact: dummy heads have zero weights, give zero output and receive zero gradient, so they stay zero, and
checkpoints do not hold them. Dummy vocabulary rows are masked out of the softmax.
"""

from dataclasses import dataclass

from megatron_hybrid.config.model import ModelConfig

FP8_ALIGNMENT = 16  # widths of FP8 matrices; also keeps bf16 rows 16-byte aligned for Hopper's fast kernels


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


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
        """Key heads are padded, and each brings its share of query or value heads, so that groups stay whole."""
        tp = tensor_parallel_size
        kv = round_up(model.kv_heads, tp)
        gdn_key = round_up(model.gdn.num_key_heads, tp) if model.gdn else 0
        return cls(
            tensor_parallel_size=tp,
            num_attention_heads=kv * (model.num_attention_heads // model.kv_heads),
            num_key_value_heads=kv,
            gdn_key_heads=gdn_key,
            gdn_value_heads=gdn_key * (model.gdn.num_value_heads // model.gdn.num_key_heads) if model.gdn else 0,
            vocab_size=round_up(model.vocab_size, FP8_ALIGNMENT * tp),
        )


@dataclass(frozen=True)
class PackedWidths:
    """What one rank's Gated DeltaNet in_proj output holds, in this order; `padding` aligns the width for FP8 and for fast
    bf16 kernels."""

    q: int
    k: int
    v: int
    gate: int
    b: int
    a: int
    padding: int

    @classmethod
    def of(cls, model: ModelConfig, tensor_parallel_size: int) -> "PackedWidths":
        gdn, sizes = model.gdn, PaddedSizes.of(model, tensor_parallel_size)
        assert gdn is not None, "asked of a model without Gated DeltaNet layers"
        key_heads, heads = sizes.gdn_key_heads // tensor_parallel_size, sizes.gdn_value_heads // tensor_parallel_size
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
