"""Blocks as data: what model.blocks changes and adds, and what is refused."""

import pytest
from pydantic import ValidationError

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
        ({"blocks": {"A": {"norm": "peri"}}}, "blocks.A.norm: peri is not implemented for attention; set it to post"),
        (
            {"blocks": {"A": {"norm": "pree"}}},
            "blocks.A.norm: 'pree' is not one of pre, post, peri; the nearest is pre",
        ),
        ({"blocks": {"A": {"norms": "pre"}}}, "blocks.A.norms: there is no such field; did you mean norm?"),
        (
            {"blocks": {"A": {"qk_norm": "per_head", "output_gate": True, "partial_rotary_factor": 0.5}}},
            "blocks.A.qk_norm: per_head is not implemented for attention; set it to projection\n"
            "blocks.A.output_gate: true is not implemented for attention; set it to false\n"
            "blocks.A.partial_rotary_factor: 0.5 is not implemented for attention; set it to 1.0",
        ),
        ({"blocks": {"B": {"norm": "pre"}}}, "blocks.B.mixer: is missing; give it: Name of a registered mixer"),
        (
            {"blocks": {"B": {"mixer": "atention"}}},
            "blocks.B.mixer: atention is not one of gated_delta_net, attention; the nearest is attention",
        ),
        ({"blocks": {"b": {"mixer": "attention"}}}, "blocks.b: is not a symbol; write one capital letter, such as B"),
        ({"layer_pattern": "GB"}, "layer_pattern: 'GB' is not a group of layers; write symbols G (Gated DeltaNet), A"),
        ({"zero_centered_norm": True}, "zero_centered_norm: true is not implemented; set it to false"),
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
