"""A ModelConfig to the config.json that transformers' `olmo_hybrid` or `olmo3` computes it by."""

from typing import Any

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf_config import ARCHITECTURES, LAYER_TYPES, OUTPUT_NORM_EPS

DEFAULT_POSITIONS = 65536


def model_type_for(model: ModelConfig) -> str:
    """Which of transformers' classes computes this model.

    Raises:
        ConversionError: none of them; says why.
    """
    kinds = set(model.layers)
    if "G" not in kinds:
        if model.rope_theta is None:
            raise ConversionError(
                "model.rope_theta is null, and transformers' olmo3 always has rotary embedding: it cannot be exported"
            )
        return "olmo3"
    for problem, why in (
        ("A" not in kinds, "has no full attention layer, and transformers' olmo_hybrid needs one"),
        ("W" in kinds, "mixes Gated DeltaNet with sliding windows, and transformers' olmo_hybrid has none"),
    ):
        if problem:
            raise ConversionError(f"model.layer_pattern = {model.layer_pattern} {why}: it cannot be exported")
    assert model.gdn is not None
    if model.gdn.norm_eps != OUTPUT_NORM_EPS:
        raise ConversionError(
            f"model.gdn.norm_eps = {model.gdn.norm_eps}, and transformers' olmo_hybrid has {OUTPUT_NORM_EPS} fixed: it cannot "
            "be exported"
        )
    return "olmo_hybrid"


def hf_from_model(model: ModelConfig, dtype: str, positions: int, bos_token_id: int | None = None) -> dict[str, Any]:
    """The config.json of a model; `model_from_hf` reads it back equal.

    Args:
        dtype: torch's name of the weights' type, such as bfloat16.
        positions: max_position_embeddings; what generation tools take for the longest sequence.

    Raises:
        ConversionError: a model that transformers cannot compute.
    """
    kind = model_type_for(model)
    names = {symbol: name for name, symbol in LAYER_TYPES.items()}
    # A null theta, not null rope_parameters: transformers 5 turns those into its default theta, 10,000.
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "use_cache": True,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": rope if kind == "olmo_hybrid" else {"full_attention": rope, "sliding_attention": dict(rope)},
        "layer_types": [names[k] for k in model.layers],
        "bos_token_id": bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
    }
    if model.attention_head_dim * model.num_attention_heads != model.hidden_size:
        config["head_dim"] = model.attention_head_dim
    if kind == "olmo3":
        config["sliding_window"] = model.sliding_window
    else:
        gdn = model.gdn
        assert gdn is not None
        config |= {
            "linear_num_key_heads": gdn.num_key_heads,
            "linear_num_value_heads": gdn.num_value_heads,
            "linear_key_head_dim": gdn.key_head_dim,
            "linear_value_head_dim": gdn.value_head_dim,
            "linear_conv_kernel_dim": gdn.conv_kernel_size,
            "linear_allow_neg_eigval": gdn.allow_negative_eigenvalues,
            "linear_a_log_min": gdn.a_init_range[0],
            "linear_a_log_max": gdn.a_init_range[1],
            "linear_dt_min": gdn.dt_init_range[0],
            "linear_dt_max": gdn.dt_init_range[1],
            "linear_dt_init_floor": gdn.dt_init_floor,
        }
    return config
