"""Mixer spec of softmax attention: everything about it that needs no torch."""

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.costs import Direction, Operation, Shard, Work
from megatron_hybrid.arch.mixer import HeadGroups, MixerSpec
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import ONES, PackedParameter, TensorSpec
from megatron_hybrid.arch.registry import register
from megatron_hybrid.mixers.attention import costs


def parameters(heads: int, groups: int, head_dim: int, hidden_size: int) -> tuple[PackedParameter, ...]:
    """Return the parameters of one mixer of `heads` query heads and `groups` key/value heads."""
    widths = {"q": heads * head_dim, "k": groups * head_dim, "v": groups * head_dim}
    projections = tuple(TensorSpec(f"{name}_proj.weight", (width, hidden_size)) for name, width in widths.items())
    norms = (TensorSpec(f"{name}_norm.weight", (widths[name],), ONES, "norm") for name in "qk")
    o_proj = TensorSpec("o_proj.weight", (hidden_size, widths["q"]))
    return (
        PackedParameter("linear_qkv.weight", projections, "rows", groups, is_gemm=True),
        *(PackedParameter(f"{n}_norm_weight", (norm,), "rows", groups) for n, norm in zip("qk", norms, strict=True)),
        PackedParameter("linear_proj.weight", (o_proj,), "columns", groups, is_gemm=True),
    )


class Attention(MixerSpec):
    """Softmax attention as in OLMo 3 and OLMo Hybrid. Its sizes are fields of `model` itself."""

    name = "attention"
    prefix = "attention"
    blocks = {
        "A": Block(mixer=name, title="attention", norm="post", qk_norm="projection"),
        "W": Block(
            mixer=name, title="sliding-window attention", norm="post", qk_norm="projection", sliding_window=True
        ),
    }
    input_linear, output_linear = "linear_qkv", "linear_proj"
    supports = frozenset({"context_parallel", "fp8", "fp8_attention"})

    def parameters(self, model: ModelFields, block: Block) -> tuple[PackedParameter, ...]:
        return parameters(model.num_attention_heads, model.kv_heads, model.attention_head_dim, model.hidden_size)

    def head_groups(self, model: ModelFields, block: Block) -> HeadGroups:
        field = "num_attention_heads" if model.num_key_value_heads is None else "num_key_value_heads"
        heads = (("attention query", model.num_attention_heads), ("attention key/value", model.kv_heads))
        return HeadGroups(model.kv_heads, f"model.{field}", "key/value heads", heads)

    def flops(self, model: ModelFields, block: Block, sequence_length: int) -> int:
        """Count scores and weighted values: 4 FLOPs per channel of q and token seen.

        A window of the causal sequence shows window - window^2 / (2 sequence) tokens on average, half the sequence where the
        window is all of it.
        """
        q = model.num_attention_heads * model.attention_head_dim
        window = model.sliding_window if block.sliding_window else None
        window = min(window or sequence_length, sequence_length)
        return 2 * q * window * (2 * sequence_length - window) // sequence_length

    def operations(self, shard: Shard) -> list[Operation]:
        return costs.operations(shard)

    def work(self, shard: Shard, direction: Direction) -> list[Work]:
        return costs.work(shard, direction)


register(Attention())
