"""The network: what its layers are and how wide. Layout (who holds which part) is not said here."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_hybrid.arch.blocks import Block, Blocks
from megatron_hybrid.arch.model_fields import ModelFields, RopeScalingConfig
from megatron_hybrid.arch.registry import default_blocks
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import Problems, shown
from megatron_hybrid.base.section import Section

__all__ = ["ModelConfig", "RopeScalingConfig"]

Backend = Literal["auto", "transformer_engine", "local"]
LayerKind = Literal["G", "A", "W"]
LAYER_KINDS = {"G": "Gated DeltaNet", "A": "attention", "W": "sliding-window attention"}
MAX_LAYERS = 4096
"""More than any model has; a slip such as GGGA*999999999 must not cost memory."""
_GROUP = re.compile(r"([GAW]+)(?:\*([1-9][0-9]*))?")


@lru_cache
def expand_pattern(pattern: str) -> tuple[LayerKind, ...]:
    """`"GGGA*2,GA"` -> `("G", "G", "G", "A", "G", "G", "G", "A", "G", "A")`.

    Groups of layer symbols are separated by commas; `*n` repeats its group n times. Spaces do not count.

    Raises:
        ValueError: a symbol other than G, A, W, a malformed repeat, or more than MAX_LAYERS layers.
    """
    layers = ""
    for group in pattern.replace(" ", "").split(","):
        match = _GROUP.fullmatch(group)
        if not match:
            upper = pattern.upper()
            hint = f"; did you mean {upper}?" if upper != pattern and _is_pattern(upper) else ""
            symbols = ", ".join(f"{symbol} ({name})" for symbol, name in LAYER_KINDS.items())
            raise ValueError(
                f"{shown(group)} is not a group of layers; write symbols {symbols} and optionally *n, as in GGGA*8 or "
                f"GGGA*7,GGA{hint}"
            )
        unit, repeats = match[1], match[2] or "1"
        room = (MAX_LAYERS - len(layers)) // len(unit)
        if len(repeats) > 9 or int(repeats) > room:
            best = f"the nearest is {unit[:MAX_LAYERS]}*{room}" if room > 0 and len(unit) < 99 else "remove this group"
            raise ValueError(f"{shown(group)} makes more than {MAX_LAYERS} layers; {best}")
        layers += unit * int(repeats)
    return tuple(layers)  # type: ignore[arg-type]


def _is_pattern(text: str) -> bool:
    return all(_GROUP.fullmatch(group) for group in text.replace(" ", "").split(","))


def fold_pattern(layers: Sequence[LayerKind]) -> str:
    """A short pattern that expands to `layers`: `GGGA*2` for `GGGAGGGA`, `GGGA*7,GGA` where a remainder is left."""
    text = "".join(layers)
    best = text
    for width in range(1, len(text) // 2 + 1):
        repeats = 1
        while text.startswith(text[:width], repeats * width):
            repeats += 1
        rest = text[repeats * width :]
        folded = f"{text[:width]}*{repeats}" + (f",{rest}" if rest else "")
        best = min(best, folded, key=len) if repeats > 1 else best
    return best


class GatedDeltaNetConfig(Section):
    """The Gated DeltaNet mixer (arXiv 2412.06464) as in OLMo Hybrid."""

    num_key_heads: PositiveInt
    """Heads of q and k."""
    num_value_heads: PositiveInt
    """Heads of v, the gate and the state; a multiple of num_key_heads (grouped value attention)."""
    key_head_dim: PositiveInt
    value_head_dim: PositiveInt
    conv_kernel_size: Literal[4] = 4
    """Taps of the causal depthwise convolution on q, k and v."""
    allow_negative_eigenvalues: bool = True
    """beta in (0, 2) instead of (0, 1)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the gated output norm; its own, not the model's."""
    a_init_range: tuple[float, float] = Field((0.0, 16.0), strict=False)
    """A_log starts as the log of a uniform draw from this range."""
    dt_init_range: tuple[PositiveFloat, PositiveFloat] = Field((1e-3, 0.1), strict=False)
    """dt_bias starts as the inverse softplus of a log-uniform draw from this range."""
    dt_init_floor: PositiveFloat = 1e-4

    @model_validator(mode="after")
    def _check(self) -> "GatedDeltaNetConfig":
        problems = Problems()
        if self.num_value_heads % self.num_key_heads:
            problems.add(
                "num_value_heads",
                f"{self.num_value_heads} is not a multiple of num_key_heads = {self.num_key_heads}; "
                f"the nearest is {nearest.multiple(self.num_value_heads, self.num_key_heads)}",
            )
        for name in ("a_init_range", "dt_init_range"):
            low, high = getattr(self, name)
            if not 0 <= low < high:
                default = list(type(self).model_fields[name].default)
                problems.add(name, f"[{low}, {high}] must have 0 <= low < high; give two such numbers, as in {default}")
        if self.dt_init_floor > self.dt_init_range[1]:
            problems.add(
                "dt_init_floor",
                f"{self.dt_init_floor} is above all of dt_init_range = {list(self.dt_init_range)}; give at most "
                f"{self.dt_init_range[1]}",
            )
        problems.raise_if_any()
        return self

    @property
    def key_dim(self) -> int:
        """Width of q, and of k."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of v, and of the gate."""
        return self.num_value_heads * self.value_head_dim


class ModelConfig(ModelFields):
    """A decoder of G (pre-norm) and A / W (post-norm, QK norm over the whole projection) layers, each with a SwiGLU."""

    layer_pattern: str
    """Symbols G, A, W in groups: `GGGA*8` is 32 layers, an attention layer after every three of Gated DeltaNet."""
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    vocab_size: PositiveInt
    """True vocabulary. Padding for tensor parallelism is added, and masked, by the layout."""
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt | None = None
    """None: as many as num_attention_heads. Fewer: grouped-query attention."""
    head_dim: PositiveInt | None = None
    """None: hidden_size / num_attention_heads."""
    gdn: GatedDeltaNetConfig | None = None
    """Needed where the pattern has a G."""
    rope_theta: PositiveFloat | None = 500_000.0
    """None: no rotary embedding (NoPE)."""
    rope_scaling: RopeScalingConfig | None = None
    """None: plain rotary embedding in all attention layers."""
    sliding_window: PositiveInt | None = None
    """Tokens a W layer sees, itself included."""
    norm_eps: PositiveFloat = 1e-6
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02
    eos_token_id: int | None = Field(None, ge=0)
    pad_token_id: int | None = Field(None, ge=0)
    backend: Backend = "auto"
    """Modules of linears, norms and attention. It is not part of the architecture: any backend loads any checkpoint. local:
    megatron-core's linears and PyTorch's attention, on any device. auto: Transformer Engine in bf16 on a GPU if it is installed,
    else local."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        problems = Problems()
        layers: tuple[LayerKind, ...] = ()
        try:
            layers = self.layers
        except ValueError as error:
            problems.add("layer_pattern", str(error))
        self._check_heads(problems)
        for name in ("eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                most = self.vocab_size - 1
                problems.add(name, f"{token} is outside the vocabulary; give at most vocab_size - 1 = {most}, or null")
        if self.rope_scaling is not None and (self.rope_theta is None or self.rope_theta <= 1):
            problems.add(
                "rope_scaling",
                f"needs a rotary embedding to scale, and rope_theta is {shown(self.rope_theta)}; set rope_theta above 1, "
                "or rope_scaling to null",
            )
        if "G" in layers and self.gdn is None:
            problems.add(
                "gdn",
                "is missing, and layer_pattern has G layers; give gdn.num_key_heads, num_value_heads, key_head_dim and "
                "value_head_dim",
            )
        if "W" in layers and self.sliding_window is None:
            problems.add(
                "sliding_window",
                "is missing, and layer_pattern has W layers; give the number of tokens they see, such as 4096",
            )
        problems.raise_if_any()
        return self

    def _check_heads(self, problems: Problems) -> None:
        heads, groups = self.num_attention_heads, self.kv_heads
        if heads % groups:
            problems.add(
                "num_key_value_heads",
                f"{groups} does not divide num_attention_heads = {heads}; the nearest is "
                f"{nearest.divisor(groups, heads)}",
            )
        if self.head_dim is None and self.hidden_size % heads:
            problems.add(
                "hidden_size",
                f"{self.hidden_size} is not a multiple of num_attention_heads = {heads}; the nearest is "
                f"{nearest.multiple(self.hidden_size, heads)}, or set head_dim",
            )
        elif self.rope_theta is not None and self.attention_head_dim % 2:
            problems.add(
                "head_dim",
                f"{self.attention_head_dim} is odd, and rotary embedding turns pairs; the nearest is "
                f"{self.attention_head_dim + 1}, or set rope_theta to null",
            )

    def architecture(self) -> dict[str, Any]:
        """Return the fields that define the model, as checkpoints store them: all but the backend."""
        return self.model_dump(mode="json", exclude={"backend"})

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, first to last."""
        return expand_pattern(self.layer_pattern)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def blocks_by_symbol(self) -> Blocks:
        """The blocks that layer_pattern uses, in the order of their first layers."""
        known = default_blocks()
        return {symbol: known[symbol] for symbol in dict.fromkeys(self.layers)}

    def block(self, index: int) -> Block:
        """Return the block of layer `index`, from 0."""
        return self.blocks_by_symbol[self.layers[index]]
