"""Mixer spec of softmax attention: everything about it that needs no torch."""

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.costs import Direction, Operation, Shard, Work
from megatron_hybrid.arch.mixer import HeadGroups, Layout, MixerSpec
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import PackedParameter, Split, TensorSpec, norm_init, round_up
from megatron_hybrid.arch.registry import register
from megatron_hybrid.base.errors import Problems, join
from megatron_hybrid.mixers.attention import costs
from megatron_hybrid.mixers.attention.sizes import AttentionSizes

FP8_HEAD_DIM = 128
"""Head size that FP8 attention needs on Hopper."""


def parameters(sizes: AttentionSizes, hidden_size: int) -> tuple[PackedParameter, ...]:
    """Return the parameters of one mixer in a model of `hidden_size`."""
    q, kv, groups = sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim, sizes.groups
    widths = {"q": q, "k": kv, "v": kv} | ({"gate": q} if sizes.output_gate else {})
    projections = tuple(TensorSpec(f"{name}_proj.weight", (width, hidden_size)) for name, width in widths.items())
    return (
        PackedParameter("linear_qkv.weight", projections, "rows", groups, is_gemm=True),
        _norm("q", q, sizes),
        _norm("k", kv, sizes),
        PackedParameter(
            "linear_proj.weight", (TensorSpec("o_proj.weight", (hidden_size, q)),), "columns", groups, is_gemm=True
        ),
    )


def _norm(name: str, width: int, sizes: AttentionSizes) -> PackedParameter:
    """Return the norm of q or k: a weight for the whole projection, or one that all heads share."""
    per_head = sizes.qk_norm == "per_head"
    shape = (sizes.head_dim if per_head else width,)
    tensor = TensorSpec(f"{name}_norm.weight", shape, norm_init(sizes.zero_centered_norm), "norm")
    split: Split = "replicated" if per_head else "rows"
    return PackedParameter(f"{name}_norm_weight", (tensor,), split, 1 if per_head else sizes.groups)


class Attention(MixerSpec):
    """Softmax attention. Its default blocks are those of OLMo 3 and OLMo Hybrid; its sizes are fields of `model` itself."""

    name = "attention"
    prefix = "attention"
    blocks = {
        "A": Block(mixer=name, title="attention", norm="post", qk_norm="projection"),
        "W": Block(
            mixer=name, title="sliding-window attention", norm="post", qk_norm="projection", sliding_window=True
        ),
    }
    options = {"qk_norm": ("per_head",), "output_gate": (True,), "partial_rotary_factor": ()}
    input_linear, output_linear = "linear_qkv", "linear_proj"
    uses_rotary_embedding = True
    has_rates = True
    has_cache = True
    supports = frozenset({"context_parallel", "cuda_graphs", "documents", "fp8", "fp8_attention"})

    def parameters(self, model: ModelFields, block: Block) -> tuple[PackedParameter, ...]:
        return parameters(AttentionSizes.of(model, block), model.hidden_size)

    def head_groups(self, model: ModelFields, block: Block) -> HeadGroups:
        field = "num_attention_heads" if model.num_key_value_heads is None else "num_key_value_heads"
        heads = (("attention query", model.num_attention_heads), ("attention key/value", model.kv_heads))
        return HeadGroups(
            count=model.kv_heads,
            field=f"model.{field}",
            title="key/value heads",
            heads=heads,
            width_field="model.head_dim",
            width=model.attention_head_dim,
        )

    def flops(self, model: ModelFields, block: Block, sequence_length: int) -> int:
        """Count scores and weighted values: 4 FLOPs per channel of q and token seen.

        A window of the causal sequence shows window - window^2 / (2 sequence) tokens on average, half the sequence where the
        window is all of it.
        """
        q = model.num_attention_heads * model.attention_head_dim
        window = model.sliding_window if block.sliding_window else None
        window = min(window or sequence_length, sequence_length)
        return 2 * q * window * (2 * sequence_length - window) // sequence_length

    def check(self, model: ModelFields, block: Block, symbol: str) -> Problems:
        problems = super().check(model, block, symbol)
        if block.sliding_window and model.sliding_window is None:
            problems.add(
                "sliding_window",
                f"is missing, and layer_pattern has {symbol} layers; give the number of tokens they see, such as 4096",
            )
        if block.partial_rotary_factor != 1:
            self._check_rotary(model, block, join("blocks", symbol), problems)
        return problems

    def _check_rotary(self, model: ModelFields, block: Block, where: str, problems: Problems) -> None:
        """Check a partial rotary embedding, which only the kernel of per-head norms has."""
        factor, d = block.partial_rotary_factor, model.attention_head_dim
        if (factor * d) % 2:
            best = min(max(2, round(factor * d / 2) * 2), d) / d
            problems.add(
                join(where, "partial_rotary_factor"),
                f"{factor} turns {factor * d:g} of {d} channels of a head, and rotary embedding turns pairs; the nearest is {best:g}",
            )
        if block.qk_norm != "per_head":
            problems.add(
                join(where, "partial_rotary_factor"),
                f"{factor} is only implemented with qk_norm per_head; set that, or this to 1.0",
            )
        if model.rope_scaling is not None:
            problems.add(
                "rope_scaling",
                f"is only implemented for whole heads, and {where}.partial_rotary_factor is {factor}; set it to null, or that "
                "to 1.0",
            )

    def check_layout(self, model: ModelFields, block: Block, symbol: str, layout: Layout) -> Problems:
        problems = Problems()
        self._check_context(model, layout, problems)
        self._check_window(model, block, symbol, layout, problems)
        reason = None
        if layout.fp8_attention and block.sliding_window:
            reason = f"has no sliding window, and layer_pattern has {symbol} layers"
        elif layout.fp8_attention and model.attention_head_dim != FP8_HEAD_DIM:
            reason = f"needs model.head_dim = {FP8_HEAD_DIM} on Hopper, and it is {model.attention_head_dim}"
        if reason:
            problems.add("precision.fp8_attention", f"true {reason}; set it to false")
        return problems

    def _check_context(self, model: ModelFields, layout: Layout, problems: Problems) -> None:
        size, groups = layout.context_parallel_size, groups_of_rank(model, layout)
        if size > max(1, groups):
            tensor = layout.tensor_parallel_size
            of = f" of each of {tensor} tensor parallel ranks" if tensor > 1 else ""
            problems.add(
                "parallel.context_parallel_size",
                f"{size} exceeds the {groups} key/value heads{of}, which its ranks share; set it to {groups} at most",
            )

    def _check_window(self, model: ModelFields, block: Block, symbol: str, layout: Layout, problems: Problems) -> None:
        window, sequence = model.sliding_window, layout.sequence_length
        if block.sliding_window and window is not None and window > sequence:
            problems.add(
                "model.sliding_window",
                f"{window} exceeds data.sequence_length = {sequence}, so {symbol} layers would be plain attention; give at most "
                f"{sequence}, or write A for {symbol} in layer_pattern",
            )

    def context_note(self, model: ModelFields, block: Block, layout: Layout) -> str:
        heads = -(-groups_of_rank(model, layout) // layout.context_parallel_size)
        heads *= model.num_attention_heads // model.kv_heads
        return f"which attends with {heads} heads over whole sequences"

    def operations(self, shard: Shard) -> list[Operation]:
        return costs.operations(shard)

    def work(self, shard: Shard, direction: Direction) -> list[Work]:
        return costs.work(shard, direction)


def groups_of_rank(model: ModelFields, layout: Layout) -> int:
    """Return the key/value heads of a tensor parallel rank, dummies included."""
    return round_up(model.kv_heads, layout.tensor_parallel_size) // layout.tensor_parallel_size


register(Attention())
