"""Mixer spec of the leaky average."""

from pydantic import PositiveInt

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.costs import (
    Direction,
    Gemm,
    MemoryWork,
    Operation,
    Shard,
    Work,
    input_linear,
    output_linear,
)
from megatron_hybrid.arch.mixer import HeadGroups, MixerSpec
from megatron_hybrid.arch.model_fields import ModelFields
from megatron_hybrid.arch.packing import Initializer, PackedParameter, TensorSpec
from megatron_hybrid.arch.registry import register
from megatron_hybrid.base.section import Section


class LeakyConfig(Section):
    """Sizes of the mixer, `model.leaky`."""

    num_heads: PositiveInt
    head_dim: PositiveInt


def parameters(leaky: LeakyConfig, hidden_size: int) -> tuple[PackedParameter, ...]:
    heads, width = leaky.num_heads, leaky.num_heads * leaky.head_dim
    projections = tuple(TensorSpec(f"{name}_proj.weight", (width, hidden_size)) for name in ("x", "gate"))
    decay = TensorSpec("decay", (heads,), Initializer("leaky_decay", (1.0, 3.0)), "leaky_decay", always_fp32=True)
    return (
        PackedParameter("in_proj.weight", projections, "rows", heads, is_gemm=True),
        PackedParameter("decay", (decay,), "rows", heads),
        PackedParameter(
            "out_proj.weight", (TensorSpec("o_proj.weight", (hidden_size, width)),), "columns", heads, is_gemm=True
        ),
    )


def sizes(model: ModelFields) -> LeakyConfig:
    section = model.section("leaky")
    assert isinstance(section, LeakyConfig)
    return section


class Leaky(MixerSpec):
    """y = a y + (1 - a) x per channel, with one a per head, times silu(gate)."""

    name = "leaky"
    prefix = "leaky"
    config_class = LeakyConfig
    blocks = {"T": Block(mixer=name, title="leaky average", norm="pre", output_gate=True)}
    input_linear, output_linear = "in_proj", "out_proj"
    decay_groups = ("leaky_decay",)
    has_cache = True

    def parameters(self, model: ModelFields, block: Block) -> tuple[PackedParameter, ...]:
        return parameters(sizes(model), model.hidden_size)

    def head_groups(self, model: ModelFields, block: Block) -> HeadGroups:
        leaky = sizes(model)
        heads = (("leaky average", leaky.num_heads),)
        return HeadGroups(
            leaky.num_heads, "model.leaky.num_heads", "leaky heads", heads, "model.leaky.head_dim", leaky.head_dim
        )

    def flops(self, model: ModelFields, block: Block, sequence_length: int) -> int:
        return 3 * sizes(model).num_heads * sizes(model).head_dim

    def operations(self, shard: Shard) -> list[Operation]:
        width, e = shard.width("x_proj.weight"), shard.element
        return [
            *input_linear(shard, "in_proj", 2 * width),
            Operation("average", 2 * e * width, 2 * e * width),
            *output_linear(shard, "out_proj", width),
        ]

    def work(self, shard: Shard, direction: Direction) -> list[Work]:
        width, tokens = shard.width("x_proj.weight"), shard.tokens
        return [
            Gemm(tokens, 2 * width, shard.hidden, "column"),
            MemoryWork("leaky average", 4 * shard.element * tokens * width),
            Gemm(tokens, shard.hidden, width, "row"),
        ]


register(Leaky())
