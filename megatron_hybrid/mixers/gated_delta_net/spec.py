"""Mixer spec of Gated DeltaNet: everything about it that needs no torch."""

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.costs import Direction, Operation, Shard, Work
from megatron_hybrid.arch.mixer import HeadGroups, MixerSpec
from megatron_hybrid.arch.model import GatedDeltaNetConfig
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import FP8_ALIGNMENT, NORMAL, ONES, Initializer, PackedParameter, TensorSpec
from megatron_hybrid.arch.registry import register
from megatron_hybrid.mixers.gated_delta_net import costs

SCALARS = "gdn_scalars"
"""Decay group of A_log and dt_bias."""
DELTA_RULE_FLOPS = 8
"""Per state entry and token, in the recurrent form: decay, read, write, read out."""


def parameters(gdn: GatedDeltaNetConfig, hidden_size: int) -> tuple[PackedParameter, ...]:
    """Return the parameters of one mixer in a model of `hidden_size`."""
    key, value, heads, groups = gdn.key_dim, gdn.value_dim, gdn.num_value_heads, gdn.num_key_heads
    widths = {"q": key, "k": key, "v": value, "gate": value, "b": heads, "a": heads}
    projections = tuple(TensorSpec(f"{name}_proj.weight", (width, hidden_size)) for name, width in widths.items())
    taps = gdn.conv_kernel_size
    convolutions = tuple(TensorSpec(f"{n}_conv.weight", (widths[n], taps), NORMAL, "convolution") for n in "qkv")
    a_log = TensorSpec("A_log", (heads,), Initializer("log_of_uniform", gdn.a_init_range), SCALARS, always_fp32=True)
    dt = Initializer("inverse_softplus_of_log_uniform", (*gdn.dt_init_range, gdn.dt_init_floor))
    dt_bias = TensorSpec("dt_bias", (heads,), dt, SCALARS, always_fp32=True)
    o_norm = TensorSpec("o_norm.weight", (gdn.value_head_dim,), ONES, "norm")
    o_proj = TensorSpec("o_proj.weight", (hidden_size, value))
    return (
        PackedParameter("in_proj.weight", projections, "rows", groups, alignment=FP8_ALIGNMENT, is_gemm=True),
        PackedParameter("conv_weight", convolutions, "rows", groups),
        PackedParameter("A_log", (a_log,), "rows", groups),
        PackedParameter("dt_bias", (dt_bias,), "rows", groups),
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
    supports = frozenset({"context_parallel", "fp8"})

    def parameters(self, model: ModelFields, block: Block) -> tuple[PackedParameter, ...]:
        return parameters(sizes(model), model.hidden_size)

    def head_groups(self, model: ModelFields, block: Block) -> HeadGroups:
        gdn = sizes(model)
        heads = (("Gated DeltaNet key", gdn.num_key_heads), ("Gated DeltaNet value", gdn.num_value_heads))
        return HeadGroups(gdn.num_key_heads, "model.gdn.num_key_heads", "Gated DeltaNet key heads", heads)

    def flops(self, model: ModelFields, block: Block, sequence_length: int) -> int:
        gdn = sizes(model)
        return DELTA_RULE_FLOPS * gdn.num_value_heads * gdn.key_head_dim * gdn.value_head_dim

    def operations(self, shard: Shard) -> list[Operation]:
        return costs.operations(shard)

    def work(self, shard: Shard, direction: Direction) -> list[Work]:
        return costs.work(shard, direction)


register(GatedDeltaNet())
