"""The network: what its layers are and how wide. Layout (who holds which part) is not said here."""

import re
from functools import cached_property
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_hybrid.config.base import Section

LayerKind = Literal["G", "A", "W"]
LAYER_KINDS = {"G": "Gated DeltaNet", "A": "attention", "W": "sliding-window attention"}
_GROUP = re.compile(r"([GAW]+)(?:\*([1-9][0-9]*))?")


def expand_pattern(pattern: str) -> tuple[LayerKind, ...]:
    """`"GGGA*2,GA"` -> `("G", "G", "G", "A", "G", "G", "G", "A", "G", "A")`.

    Groups of layer symbols are separated by commas; `*n` repeats its group n times.

    Raises:
        ValueError: a symbol other than G, A, W, or a malformed repeat.
    """
    layers = ""
    for group in pattern.replace(" ", "").split(","):
        match = _GROUP.fullmatch(group)
        if not match:
            raise ValueError(
                f"{group!r} is not a group of layers: write symbols {', '.join(f'{s} ({n})' for s, n in LAYER_KINDS.items())}"
                " and optionally *n, as in GGGA*8 or GGGA*7,GGA"
            )
        layers += match[1] * int(match[2] or 1)
    return tuple(layers)  # type: ignore[arg-type]


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
    a_init_range: tuple[float, float] = (0.0, 16.0)
    """A_log starts as the log of a uniform draw from this range."""
    dt_init_range: tuple[PositiveFloat, PositiveFloat] = (1e-3, 0.1)
    """dt_bias starts as the inverse softplus of a log-uniform draw from this range."""
    dt_init_floor: PositiveFloat = 1e-4

    @model_validator(mode="after")
    def _check(self) -> "GatedDeltaNetConfig":
        if self.num_value_heads % self.num_key_heads:
            down = max(self.num_key_heads, self.num_value_heads // self.num_key_heads * self.num_key_heads)
            raise ValueError(
                f"num_value_heads = {self.num_value_heads} must be a multiple of num_key_heads = {self.num_key_heads}: "
                f"the nearest is {down}"
            )
        for name in ("a_init_range", "dt_init_range"):
            low, high = getattr(self, name)
            if not 0 <= low < high:
                raise ValueError(f"{name} = [{low}, {high}] must satisfy 0 <= low < high")
        return self

    @property
    def key_dim(self) -> int:
        """Width of q, and of k."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of v, and of the gate."""
        return self.num_value_heads * self.value_head_dim


class ModelConfig(Section):
    """A decoder of G (pre-norm) and A / W (post-norm, QK norm over the whole projection) layers, each with a SwiGLU MLP."""

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
    sliding_window: PositiveInt | None = None
    """Tokens a W layer sees, itself included."""
    norm_eps: PositiveFloat = 1e-6
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02
    eos_token_id: int | None = Field(None, ge=0)
    pad_token_id: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        expand_pattern(self.layer_pattern)
        heads, groups = self.num_attention_heads, self.kv_heads
        if heads % groups:
            best = min((g for g in range(1, heads + 1) if heads % g == 0), key=lambda g: abs(g - groups))
            raise ValueError(f"num_key_value_heads = {groups} must divide num_attention_heads = {heads}: the nearest is {best}")
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} does not divide by num_attention_heads = {heads}: set head_dim, or "
                f"hidden_size = {max(1, round(self.hidden_size / heads)) * heads}"
            )
        if self.rope_theta is not None and self.attention_head_dim % 2:
            raise ValueError(
                f"head_dim = {self.attention_head_dim} must be even for rotary embedding: the nearest is "
                f"{self.attention_head_dim + 1}, or set rope_theta: null"
            )
        if "G" in self.layers and self.gdn is None:
            raise ValueError("gdn is missing: layer_pattern has G layers; give gdn.num_key_heads, num_value_heads, key_head_dim, value_head_dim")
        if "W" in self.layers and self.sliding_window is None:
            raise ValueError("sliding_window is missing: layer_pattern has W layers; give the number of tokens they see, such as 4096")
        for name in ("eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"{name} = {token} is not below vocab_size = {self.vocab_size}")
        return self

    @cached_property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, first to last."""
        return expand_pattern(self.layer_pattern)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads
