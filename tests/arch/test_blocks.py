"""Blocks as data: what model.blocks changes and adds, and what is refused."""

import pytest
from pydantic import ValidationError

from megatron_hybrid.arch.layer import layer_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.presets import olmo_hybrid_tiny
from megatron_hybrid.config.translate import translate


def tiny(**changes) -> ModelConfig:
    """The tiny preset with other fields."""
    try:
        return ModelConfig.model_validate(olmo_hybrid_tiny().model_dump() | changes)
    except ValidationError as error:
        raise translate(error, ModelConfig) from None


def test_the_blocks_of_olmo_hybrid():
    blocks = olmo_hybrid_tiny().blocks_by_symbol
    assert list(blocks) == ["G", "A"]
    assert (blocks["G"].mixer, blocks["G"].norm) == ("gated_delta_net", "pre")
    assert (blocks["A"].mixer, blocks["A"].norm, blocks["A"].qk_norm) == ("attention", "post", "projection")


def test_a_block_is_changed_field_by_field():
    model = tiny(blocks={"A": {"title": "global attention"}})
    assert model.block(3) == olmo_hybrid_tiny().block(3).model_copy(update={"title": "global attention"})
    assert ModelConfig.model_validate(model.model_dump()) == model
    assert hash(model) == hash(ModelConfig.model_validate(model.model_dump()))


def test_a_new_symbol_begins_with_its_mixers_first_block():
    model = tiny(layer_pattern="GB", blocks={"B": {"mixer": "attention", "sliding_window": True}}, sliding_window=4)
    block = model.block(1)
    assert (block.norm, block.qk_norm, block.sliding_window) == ("post", "projection", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blocks": {"A": {"norm": "pree"}}},
            "blocks.A.norm: 'pree' is not one of pre, post, peri; the nearest is pre",
        ),
        ({"blocks": {"A": {"norms": "pre"}}}, "blocks.A.norms: there is no such field; did you mean norm?"),
        (
            {"blocks": {"G": {"qk_norm": "per_head", "output_gate": False, "partial_rotary_factor": 0.5}}},
            "blocks.G.qk_norm: per_head is not implemented for gated_delta_net; set it to none\n"
            "blocks.G.output_gate: false is not implemented for gated_delta_net; set it to true\n"
            "blocks.G.partial_rotary_factor: 0.5 is not implemented for gated_delta_net; set it to 1.0",
        ),
        (
            {"blocks": {"A": {"qk_norm": "none"}}},
            "blocks.A.qk_norm: none is not implemented for attention; set it to per_head or projection",
        ),
        (
            {"blocks": {"A": {"partial_rotary_factor": 0.5}}},
            "blocks.A.partial_rotary_factor: 0.5 is only implemented with qk_norm per_head; set that, or this to 1.0",
        ),
        (
            {"blocks": {"A": {"qk_norm": "per_head", "partial_rotary_factor": 0.3}}},
            "blocks.A.partial_rotary_factor: 0.3 turns 9.6 of 32 channels of a head, and rotary embedding turns pairs; the nearest "
            "is 0.3125",
        ),
        (
            {
                "blocks": {"A": {"qk_norm": "per_head", "partial_rotary_factor": 0.5}},
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 64},
            },
            "rope_scaling: is only implemented for whole heads, and blocks.A.partial_rotary_factor is 0.5",
        ),
        (
            {
                "layer_pattern": "GAB",
                "blocks": {"B": {"mixer": "attention", "qk_norm": "per_head", "partial_rotary_factor": 0.5}},
            },
            "blocks.B.partial_rotary_factor: 0.5 differs from another block's 1.0, and a model has one table of angles",
        ),
        ({"blocks": {"B": {"norm": "pre"}}}, "blocks.B.mixer: is missing; give it: Name of a registered mixer"),
        (
            {"blocks": {"B": {"mixer": "atention"}}},
            "blocks.B.mixer: atention is not one of gated_delta_net, attention, kda; the nearest is attention",
        ),
        ({"blocks": {"b": {"mixer": "attention"}}}, "blocks.b: is not a symbol; write one capital letter, such as B"),
        ({"layer_pattern": "GB"}, "layer_pattern: 'GB' is not a group of layers; write symbols G (Gated DeltaNet), A"),
        (
            {"blocks": {"B": {"mixer": "attention", "sliding_window": True}}, "layer_pattern": "GB"},
            "sliding_window: is missing, and layer_pattern has B layers; give the number of tokens they see",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        ("pre", ["input_layernorm.weight", "pre_mlp_layernorm.weight"]),
        ("post", ["mlp.linear_fc2.norm.weight", "self_attention.linear_proj.norm.weight"]),
        (
            "peri",
            [
                "input_layernorm.weight",
                "mlp.linear_fc2.norm.weight",
                "pre_mlp_layernorm.weight",
                "self_attention.linear_proj.norm.weight",
            ],
        ),
    ],
)
@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms_of_every_placement(norm, names, zero_centered):
    model = tiny(blocks={"A": {"norm": norm}}, zero_centered_norm=zero_centered)
    norms = [p for p in layer_parameters(model, model.block(3)) if p.tensors[0].shape == (model.hidden_size,)]
    norms = [p for p in norms if not p.name.endswith("norm_weight")]
    assert sorted(p.name for p in norms) == names
    tensors = {p.tensors[0].name: p.tensors[0].init.distribution for p in norms}
    assert len(tensors) == len(names) and set(tensors.values()) == {"zeros" if zero_centered else "ones"}
