"""Blocks: what a layer is made of, as data."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from megatron_hybrid.base.section import Section


class Block(Section):
    """One kind of layer: a mixer and an MLP, each with a norm.

    A mixer brings blocks with default symbols (`arch/mixer.py`); `model.blocks` changes them or adds symbols.
    """

    mixer: str
    """Name of a registered mixer, such as gated_delta_net."""
    title: str
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


Blocks = Mapping[str, Block]
"""Blocks by layer_pattern symbol."""
