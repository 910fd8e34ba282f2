"""Attention as a megatron-core TransformerConfig describes it, for models of other projects."""

from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.mixers.attention.sizes import AttentionSizes

_UNSUPPORTED = {
    "rotary_interleaved": False,
    "add_qkv_bias": False,
    "attention_output_gate": False,
    "qk_l2_norm": False,
    "qk_clip": False,
    "multi_latent_attention": False,
    "softmax_type": "vanilla",
}
"""Fields that megatron-core's attention obeys and SelfAttention does not, with the only value that is supported."""


def sizes_of_megatron(config: TransformerConfig) -> AttentionSizes:
    """Return the sizes in a TransformerConfig, which tensor parallelism has to divide.

    Raises:
        UserError: names the field that SelfAttention would have to ignore.
    """
    for field, value in _UNSUPPORTED.items():
        if (found := getattr(config, field)) != value:
            raise UserError(f"{field}: {found!r} is not supported by this attention; set it to {value!r}")
    return AttentionSizes(
        heads=config.num_attention_heads,
        groups=config.num_query_groups or config.num_attention_heads,
        head_dim=config.kv_channels,
        norm_eps=config.layernorm_epsilon,
        zero_centered_norm=config.layernorm_zero_centered_gamma,
    )


def turns_by_position(config: TransformerConfig, layer_number: int) -> bool:
    """Return whether a layer has rotary embedding, if the model has: `no_rope_freq` lists those that have none."""
    return not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])


def concentration_factor(config: TransformerConfig) -> float:
    """Return the factor of YaRN by which q and k grow where they are turned."""
    return float(_yarn_get_concentration_factor_from_config(config))
