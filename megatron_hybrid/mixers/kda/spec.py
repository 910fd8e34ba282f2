"""Mixer spec of Kimi Delta Attention: everything about it that needs no torch."""

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.costs import Direction, Operation, Shard, Work
from megatron_hybrid.arch.mixer import HeadGroups, Layout, MixerSpec, convolution_problems
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import (
    FP8_ALIGNMENT,
    NORMAL,
    ONES,
    ZEROS,
    Initializer,
    PackedParameter,
    TensorSpec,
)
from megatron_hybrid.arch.registry import register
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.mixers.kda import costs
from megatron_hybrid.mixers.kda.config import KimiDeltaAttentionConfig

SCALARS = "kda_scalars"
"""Decay group of A_log and dt_bias."""
RULE_FLOPS = 8
"""Per state entry and token, in the recurrent form: decay, read, write, read out."""


def parameters(kda: KimiDeltaAttentionConfig, hidden_size: int) -> tuple[PackedParameter, ...]:
    """Return the parameters of one mixer in a model of `hidden_size`.

    The low-rank projections f_a and g_a have no heads: tensor parallel ranks share their rows, and gather their outputs.
    """
    key, value, heads, rank = kda.key_dim, kda.value_dim, kda.num_heads, kda.rank
    widths = {"q": key, "k": key, "v": value, "f_a": rank, "g_a": rank, "b": heads}
    projections = tuple(TensorSpec(f"{name}_proj.weight", (width, hidden_size)) for name, width in widths.items())
    low_rank = tuple(f"{name}_a_proj.weight" for name in "fg")
    taps = kda.conv_kernel_size
    convolutions = tuple(TensorSpec(f"{n}_conv.weight", (widths[n], taps), NORMAL, "convolution") for n in "qkv")
    f_b, g_b = (TensorSpec(f"{name}_b_proj.weight", (width, rank)) for name, width in (("f", key), ("g", value)))
    a_init = Initializer("log_of_uniform", kda.a_init_range) if kda.gate_lower_bound is None else ZEROS
    dt_init = Initializer("inverse_softplus_of_log_uniform", (*kda.dt_init_range, kda.dt_init_floor))
    a_log = TensorSpec("A_log", (heads,), a_init, SCALARS, always_fp32=True)
    dt_bias = TensorSpec("dt_bias", (key,), dt_init, SCALARS, always_fp32=True)
    o_norm = TensorSpec("o_norm.weight", (kda.value_head_dim,), ONES, "norm")
    o_proj = TensorSpec("o_proj.weight", (hidden_size, value))
    return (
        PackedParameter(
            "in_proj.weight", projections, "rows", heads, alignment=FP8_ALIGNMENT, is_gemm=True, headless=low_rank
        ),
        PackedParameter("conv_weight", convolutions, "rows", heads),
        PackedParameter("f_b_weight", (f_b,), "rows", heads),
        PackedParameter("g_b_weight", (g_b,), "rows", heads),
        PackedParameter("A_log", (a_log,), "rows", heads),
        PackedParameter("dt_bias", (dt_bias,), "rows", heads),
        PackedParameter("o_norm_weight", (o_norm,)),
        PackedParameter("out_proj.weight", (o_proj,), "columns", heads, is_gemm=True),
    )


def sizes(model: ModelFields) -> KimiDeltaAttentionConfig:
    """Return the model's section `kda`, which a validated model with such layers has."""
    section = model.section(KimiDeltaAttention.prefix)
    assert isinstance(section, KimiDeltaAttentionConfig)
    return section


class KimiDeltaAttention(MixerSpec):
    """Kimi Delta Attention (arXiv 2510.26692): a delta rule with a decay per channel, as in Kimi Linear."""

    name = "kda"
    prefix = "kda"
    config_class = KimiDeltaAttentionConfig
    blocks = {"K": Block(mixer=name, title="Kimi Delta Attention", norm="pre", output_gate=True)}
    input_linear, output_linear = "in_proj", "out_proj"
    has_cache = True
    supports = frozenset({"context_parallel", "cuda_graphs", "documents", "fp8"})
    decay_groups = (SCALARS,)
    init_fields = ("a_init_range", "dt_init_range", "dt_init_floor")

    def parameters(self, model: ModelFields, block: Block) -> tuple[PackedParameter, ...]:
        return parameters(sizes(model), model.hidden_size)

    def head_groups(self, model: ModelFields, block: Block) -> HeadGroups:
        kda = sizes(model)
        return HeadGroups(
            count=kda.num_heads,
            field="model.kda.num_heads",
            title="Kimi Delta Attention heads",
            heads=(("Kimi Delta Attention", kda.num_heads),),
            width_field="model.kda.value_head_dim",
            width=kda.value_head_dim,
        )

    def flops(self, model: ModelFields, block: Block, sequence_length: int) -> int:
        kda = sizes(model)
        low_rank = 2 * kda.rank * (kda.key_dim + kda.value_dim)  # the second halves of the gates' projections
        return low_rank + RULE_FLOPS * kda.num_heads * kda.key_head_dim * kda.value_head_dim

    def check_layout(self, model: ModelFields, block: Block, symbol: str, layout: Layout) -> Problems:
        problems = convolution_problems("Kimi Delta Attention", sizes(model).conv_kernel_size, layout)
        if layout.cuda_graphs != "none" and layout.documents != "keep":
            problems.add(
                "train.cuda_graph_impl",
                f"{layout.cuda_graphs}: Kimi Delta Attention (layer_pattern's {symbol}) reads the number of chunks of documents on "
                "the host; set it to none, or data.documents to keep",
            )
        return problems

    def operations(self, shard: Shard) -> list[Operation]:
        return costs.operations(shard)

    def work(self, shard: Shard, direction: Direction) -> list[Work]:
        return costs.work(shard, direction)


register(KimiDeltaAttention())
