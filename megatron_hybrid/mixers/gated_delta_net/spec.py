"""Mixer spec of Gated DeltaNet: everything about it that needs no torch."""

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.costs import Direction, Operation, Shard, Work
from megatron_hybrid.arch.mixer import HeadGroups, Layout, MixerSpec, convolution_problems
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import FP8_ALIGNMENT, NORMAL, ONES, Initializer, PackedParameter, TensorSpec
from megatron_hybrid.arch.registry import register
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.mixers.gated_delta_net import costs
from megatron_hybrid.mixers.gated_delta_net.config import GatedDeltaNetConfig

SCALARS = "gdn_scalars"
"""Decay group of A_log and dt_bias."""
FP32_PARAMETERS = ("A_log", "dt_bias")
"""Half precision would move the decay rates (Megatron-LM issue 3634)."""
DELTA_RULE_FLOPS = 8
"""Per state entry and token, in the recurrent form: decay, read, write, read out."""


def parameters(gdn: GatedDeltaNetConfig, hidden_size: int) -> tuple[PackedParameter, ...]:
    """Return the parameters of one mixer in a model of `hidden_size`."""
    key, value, heads, groups = gdn.key_dim, gdn.value_dim, gdn.num_value_heads, gdn.num_key_heads
    widths = {"q": key, "k": key, "v": value, "gate": value, "b": heads, "a": heads}
    projections = tuple(TensorSpec(f"{name}_proj.weight", (width, hidden_size)) for name, width in widths.items())
    taps = gdn.conv_kernel_size
    convolutions = tuple(TensorSpec(f"{n}_conv.weight", (widths[n], taps), NORMAL, "convolution") for n in "qkv")
    a_init = Initializer("log_of_uniform", gdn.a_init_range)
    dt_init = Initializer("inverse_softplus_of_log_uniform", (*gdn.dt_init_range, gdn.dt_init_floor))
    scalars = (
        TensorSpec(name, (heads,), init, SCALARS, always_fp32=True)
        for name, init in zip(FP32_PARAMETERS, (a_init, dt_init), strict=True)
    )
    o_norm = TensorSpec("o_norm.weight", (gdn.value_head_dim,), ONES, "norm")
    o_proj = TensorSpec("o_proj.weight", (hidden_size, value))
    return (
        PackedParameter("in_proj.weight", projections, "rows", groups, alignment=FP8_ALIGNMENT, is_gemm=True),
        PackedParameter("conv_weight", convolutions, "rows", groups),
        *(PackedParameter(scalar.name, (scalar,), "rows", groups) for scalar in scalars),
        PackedParameter("o_norm_weight", (o_norm,)),
        PackedParameter("out_proj.weight", (o_proj,), "columns", groups, is_gemm=True),
    )


def sizes(model: ModelFields) -> GatedDeltaNetConfig:
    """Return the model's section `gdn`, which a validated model with such layers has."""
    section = model.section(GatedDeltaNet.prefix)
    assert isinstance(section, GatedDeltaNetConfig)
    return section


class GatedDeltaNet(MixerSpec):
    """Gated DeltaNet (arXiv 2412.06464) as in OLMo Hybrid."""

    name = "gated_delta_net"
    prefix = "gdn"
    config_class = GatedDeltaNetConfig
    blocks = {"G": Block(mixer=name, title="Gated DeltaNet", norm="pre", output_gate=True)}
    input_linear, output_linear = "in_proj", "out_proj"
    has_rates = True
    has_cache = True
    supports = frozenset({"context_parallel", "cuda_graphs", "documents", "fp8"})
    decay_groups = (SCALARS,)
    init_fields = ("a_init_range", "dt_init_range", "dt_init_floor")

    def parameters(self, model: ModelFields, block: Block) -> tuple[PackedParameter, ...]:
        return parameters(sizes(model), model.hidden_size)

    def head_groups(self, model: ModelFields, block: Block) -> HeadGroups:
        gdn = sizes(model)
        heads = (("Gated DeltaNet key", gdn.num_key_heads), ("Gated DeltaNet value", gdn.num_value_heads))
        return HeadGroups(
            count=gdn.num_key_heads,
            field="model.gdn.num_key_heads",
            title="Gated DeltaNet key heads",
            heads=heads,
            width_field="model.gdn.value_head_dim",
            width=gdn.value_head_dim,
        )

    def flops(self, model: ModelFields, block: Block, sequence_length: int) -> int:
        gdn = sizes(model)
        return DELTA_RULE_FLOPS * gdn.num_value_heads * gdn.key_head_dim * gdn.value_head_dim

    def check_layout(self, model: ModelFields, block: Block, symbol: str, layout: Layout) -> Problems:
        return convolution_problems("Gated DeltaNet", sizes(model).conv_kernel_size, layout)

    def operations(self, shard: Shard) -> list[Operation]:
        return costs.operations(shard)

    def work(self, shard: Shard, direction: Direction) -> list[Work]:
        return costs.work(shard, direction)


register(GatedDeltaNet())
