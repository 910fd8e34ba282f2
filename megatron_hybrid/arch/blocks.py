"""Blocks: what a layer is made of, as data."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from megatron_hybrid.base.section import Section


class Block(Section):
    """One kind of layer: a mixer and an MLP, each with a norm.

    A mixer brings blocks with default symbols (`arch/mixer.py`); `model.blocks` changes them or adds symbols.
    """

    mixer: str
    """Name of a registered mixer, such as gated_delta_net."""
    title: str = ""
    """Words for it in tables and messages."""
    norm: Literal["pre", "post", "peri"] = "pre"
    """Norm of mixer and MLP: before each, after each, or both."""
    qk_norm: Literal["none", "per_head", "projection"] = "none"
    """Norm of queries and keys: none, over each head, or over the whole projection."""
    output_gate: bool = False
    """Multiply the mixer's output by a learned gate."""
    partial_rotary_factor: float = Field(1.0, gt=0, le=1)
    """Share of each head's channels that the rotary embedding turns."""
    sliding_window: bool = False
    """Attend to the last model.sliding_window tokens only."""
    mlp: Literal["swiglu", "none"] = "swiglu"
    """Feed-forward sublayer after the mixer."""


Blocks = Mapping[str, Block]
"""Blocks by layer_pattern symbol."""


def complete_blocks(given: Any, defaults: Blocks, first_of_mixer: Mapping[str, Block]) -> Any:
    """Return `given` with the fields that it leaves out taken from the default block of its symbol, or of its mixer.

    Args:
        given: `model.blocks` before validation; anything but a mapping of mappings is left for validation to refuse.
        first_of_mixer: the first block that each mixer brings.
    """
    if not isinstance(given, Mapping):
        return given
    return {symbol: _complete(symbol, fields, defaults, first_of_mixer) for symbol, fields in given.items()}


def _complete(symbol: object, fields: Any, defaults: Blocks, first_of_mixer: Mapping[str, Block]) -> Any:
    if not isinstance(fields, Mapping):
        return fields
    base = defaults.get(str(symbol))
    mixer = fields.get("mixer", base.mixer if base else None)
    if base is None or mixer != base.mixer:
        base = first_of_mixer.get(mixer) if isinstance(mixer, str) else None
    return fields if base is None else {**base.model_dump(), **fields}
