"""A ModelConfig to the config.json that transformers' `olmo_hybrid` or `olmo3` computes it by."""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf_config import ARCHITECTURES, LAYER_TYPES, OUTPUT_NORM_EPS
from megatron_hybrid.convert.hf_fields import WRITTEN_BACK

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


def _rope(model: ModelConfig, kind: str) -> dict[str, Any]:
    """Rotary embedding in every form that a version of transformers reads (convert/hf_rope.py).

    A null theta, not null rope_parameters: transformers 5 turns those into its default theta, 10,000.
    """
    plain = {"rope_type": "default", "rope_theta": model.rope_theta}
    scaling = None
    if model.rope_scaling is not None:
        attention_factor = model.rope_scaling.effective_attention_factor
        scaling = model.rope_scaling.model_dump() | {"attention_factor": attention_factor}
    full = plain | (scaling or {})
    if kind == "olmo_hybrid":  # younger than the other forms
        return {"rope_parameters": full}
    flat = {"rope_theta": model.rope_theta} | ({"rope_scaling": scaling} if scaling else {})
    return {"rope_parameters": {"full_attention": full, "sliding_attention": plain}, **flat}


def hf_from_model(
    model: ModelConfig, dtype: str, positions: int, origin: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The config.json of a model; `model_from_hf` reads it back equal.

    Args:
        dtype: torch's name of the weights' type, such as bfloat16.
        positions: max_position_embeddings; what generation tools take for the longest sequence.
        origin: the config.json that the model was converted from: fields that change no logit are taken from it.

    Raises:
        ConversionError: a model that transformers cannot compute.
    """
    kind = model_type_for(model)
    origin = origin or {}
    names = {symbol: name for name, symbol in LAYER_TYPES.items()}
    ends = origin.get("eos_token_id")
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
        **_rope(model, kind),
        "layer_types": [names[k] for k in model.layers],
        "bos_token_id": _token(origin.get("bos_token_id"), model),
        "eos_token_id": ends if isinstance(ends, list) and model.eos_token_id in ends else model.eos_token_id,
        "pad_token_id": model.pad_token_id,
    }
    config |= {name: value for name, value in origin.items() if name in WRITTEN_BACK}
    if model.attention_head_dim * model.num_attention_heads != model.hidden_size:
        config["head_dim"] = model.attention_head_dim
    if kind == "olmo3":
        # transformers makes the sliding layers' mask without such layers, too. Readers that apply the window to all layers
        # must not cut anything.
        config["sliding_window"] = model.sliding_window if "W" in model.layers else positions
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


def _token(token: object, model: ModelConfig) -> int | None:
    return token if type(token) is int and 0 <= token < model.vocab_size else None
