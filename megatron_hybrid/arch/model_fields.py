"""The fields of a model that are not one mixer's own, and the sizes that follow from them."""

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.base.section import Section

Backend = Literal["auto", "transformer_engine", "local"]


class RopeScalingConfig(Section):
    """YaRN (arXiv 2309.00071): stretches the rotary embedding of A layers to longer sequences, as in OLMo 3.

    W layers keep the plain rotary embedding. Fields are those of transformers' `rope_parameters`.
    """

    rope_type: Literal["yarn"] = "yarn"
    """Method. Only YaRN is implemented."""
    factor: float = Field(ge=1)
    """Longest sequence divided by original_max_position_embeddings."""
    original_max_position_embeddings: PositiveInt
    """Sequence length before the extension."""
    attention_factor: PositiveFloat | None = None
    """Multiplies the rotated queries and keys. None: 0.1 ln(factor) + 1."""
    beta_fast: PositiveFloat = 32.0
    """Dimensions that turn at least this often over the original length keep their frequency."""
    beta_slow: PositiveFloat = 1.0
    """Dimensions that turn at most this often are slowed down by the whole factor."""

    @model_validator(mode="after")
    def _check(self) -> "RopeScalingConfig":
        if self.beta_slow > self.beta_fast:
            raise ConfigError.at(
                "beta_slow",
                f"{self.beta_slow} is above beta_fast = {self.beta_fast}; give at most that, such as 1.0",
            )
        return self

    @property
    def effective_attention_factor(self) -> float:
        """attention_factor, or its default."""
        return self.attention_factor if self.attention_factor is not None else 0.1 * math.log(self.factor) + 1.0


class ModelFields(Section):
    """Sizes of a model, as mixers see them. `ModelConfig` adds the mixers' own sections and all checks."""

    layer_pattern: str
    """Symbols of blocks in groups: `GGGA*8` is 32 layers, an attention layer after every three of Gated DeltaNet."""
    blocks: Mapping[str, Block] = {}
    """Blocks of layer_pattern symbols: changes to those that mixers bring, and new ones. A new symbol begins with its mixer's first
    block."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt
    """Inner width of the SwiGLU MLP."""
    vocab_size: PositiveInt
    """True vocabulary. Padding for tensor parallelism is added, and masked, by the layout."""
    num_attention_heads: PositiveInt
    """Query heads of attention layers."""
    num_key_value_heads: PositiveInt | None = None
    """None: as many as num_attention_heads. Fewer: grouped-query attention."""
    head_dim: PositiveInt | None = None
    """None: hidden_size / num_attention_heads."""
    rope_theta: PositiveFloat | None = 500_000.0
    """None: no rotary embedding (NoPE)."""
    rope_scaling: RopeScalingConfig | None = None
    """None: plain rotary embedding in all attention layers."""
    sliding_window: PositiveInt | None = None
    """Tokens a W layer sees, itself included."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + weight."""
    embed_scale: PositiveFloat = 1.0
    """Factor of the embeddings. AI2's small hybrids have the square root of hidden_size."""
    embedding_norm: bool = False
    """Normalise the embeddings, after embed_scale and before the first layer."""
    tie_embeddings: bool = False
    """Use the embedding's weight in the output layer, without embed_scale and embedding_norm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights."""
    eos_token_id: int | None = Field(None, ge=0)
    """End-of-document token. It is written to exports and compared with the tokenizer's."""
    pad_token_id: int | None = Field(None, ge=0)
    """Padding token, which is written to exports only."""
    backend: Backend = "auto"
    """Modules of linears, norms and attention. It is not part of the architecture: any backend loads any checkpoint. local:
    megatron-core's linears and PyTorch's attention, on any device. auto: Transformer Engine in bf16 on a GPU if it is installed,
    else local."""

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def section(self, name: str) -> Section | None:
        """Return the section of a mixer, or None where the model has none."""
        section = getattr(self, name, None)
        assert section is None or isinstance(section, Section)
        return section
