"""config.json to ModelConfig and back, with every field accounted for (fields.py).

A value that ModelConfig cannot represent is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig, fold_pattern
from megatron_hybrid.config.translate import translate
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.base import Architecture
from megatron_hybrid.convert.hf.fields import COMMON, KEPT, Fields
from megatron_hybrid.convert.hf.registry import ARCHITECTURES, architecture_for, find_architecture
from megatron_hybrid.convert.hf.rope import read_rope, write_rope

MAX_LAYERS = 4096
DEFAULT_POSITIONS = 65536
_ORDER = (
    "architectures", "model_type", "dtype", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "tie_word_embeddings", "attention_bias", "attention_dropout",
)  # fmt: skip
"""Order of the first fields in an exported config.json."""


@dataclass(frozen=True)
class ReadConfig:
    """Contents of a config.json."""

    model: ModelConfig
    architecture: Architecture
    notes: tuple[str, ...]
    """Notes for the user."""
    defaults: dict[str, Any]
    """Absent fields, with the values that transformers takes for them."""


def model_from_hf(config: dict[str, Any], eos_token_id: int | None = None) -> ModelConfig:
    """Return the model that a config.json describes. See `read_config`."""
    return read_config(config, eos_token_id).model


def read_config(config: dict[str, Any], eos_token_id: int | None = None) -> ReadConfig:
    """Read a config.json.

    Args:
        eos_token_id: the one to take if config.json lists several.

    Raises:
        ConversionError: lists every field that is unknown, missing, or not representable.
    """
    architecture = find_architecture(config.get("model_type"))
    config = architecture.language_config(config)
    fields = Fields(config, architecture.fields)
    fields.check_known()
    classes = config.get("architectures")
    if classes not in (None, [architecture.class_name]):
        fields.problems.append(f"architectures is {classes!r:.200}, not [{architecture.class_name!r}]")
    model = _read_model(fields, architecture, eos_token_id)
    if fields.problems:
        raise ConversionError("config.json: " + "; ".join([*dict.fromkeys(fields.problems)][:10]))
    try:
        return ReadConfig(ModelConfig.model_validate(model), architecture, tuple(fields.notes), fields.defaults)
    except ValidationError as error:
        raise ConversionError(f"config.json: {str(translate(error, ModelConfig))[:2000]}") from None


def _read_model(fields: Fields, architecture: Architecture, eos_token_id: int | None) -> dict[str, Any]:
    """Return the fields of ModelConfig. Problems are added to `fields`."""
    types = _read_layer_types(fields, architecture)
    theta, scaling = read_rope(fields, types, architecture.rope)
    model: dict[str, Any] = {entry.ours: entry.read(fields) for entry in COMMON}
    heads, vocabulary = model["num_attention_heads"], model["vocab_size"]
    model |= {
        "layer_pattern": fold_pattern([architecture.layer_types[name] for name in types]) if types else None,
        "num_key_value_heads": fields.get("num_key_value_heads", int),
        "head_dim": fields.get("head_dim", int),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "eos_token_id": _read_eos(fields, eos_token_id, vocabulary),
        "pad_token_id": _in_vocabulary(fields, "pad_token_id", fields.get("pad_token_id", int), vocabulary),
        **architecture.read(fields, types),
    }
    if model["num_key_value_heads"] == heads:
        model["num_key_value_heads"] = None
    if heads and model["hidden_size"] == heads * (model["head_dim"] or 0):
        model["head_dim"] = None
    return model


def _read_layer_types(fields: Fields, architecture: Architecture) -> list[str]:
    """Return the type of each layer, or an empty list and add a problem."""
    count = fields.get("num_hidden_layers", int, ...)
    if count is None or not 0 < count <= MAX_LAYERS:
        fields.problems.append(f"num_hidden_layers {count!r} is not from 1 to {MAX_LAYERS}")
        return []
    types = architecture.read_layer_types(fields, count)
    if not isinstance(types, list) or len(types) != count or any(t not in [*architecture.layer_types] for t in types):
        known = " or ".join(architecture.layer_types)
        fields.problems.append(
            f"layer_types is not a list of num_hidden_layers = {count} times {known}: {types!r:.200}"
        )
        return []
    return types


def _read_eos(fields: Fields, chosen: int | None, vocabulary: int | None) -> int | None:
    value = fields.get("eos_token_id", (int, list))
    values = value if isinstance(value, list) else [value]
    if chosen is not None:
        return chosen
    if len(values) != 1 or isinstance(values[0], bool) or not isinstance(values[0], int | None):
        fields.problems.append(f"eos_token_id lists {values!r:.100}; say which one ends a document: --eos-token-id N")
        return None
    return _in_vocabulary(fields, "eos_token_id", values[0], vocabulary)


def _in_vocabulary(fields: Fields, name: str, token: int | None, vocabulary: int | None) -> int | None:
    """Return the token, or None if it is transformers' default and the vocabulary is smaller."""
    taken_as_default = name in fields.defaults
    return None if taken_as_default and token is not None and vocabulary is not None and token >= vocabulary else token


def hf_from_model(
    model: ModelConfig,
    dtype: str,
    positions: int,
    origin: dict[str, Any] | None = None,
    architecture: Architecture | None = None,
) -> dict[str, Any]:
    """Return the config.json of a model. `model_from_hf` reads it back equal.

    Args:
        dtype: torch's name of the weights' type, such as bfloat16.
        positions: max_position_embeddings, which generation tools take for the longest sequence.
        origin: the config.json that the model was converted from. Fields that change no logit are copied from it.
        architecture: None: the first that computes the model.

    Raises:
        ConversionError: transformers cannot compute the model.
    """
    architecture = architecture or architecture_for(model)
    whole_origin = origin or {}
    origin = language_fields(whole_origin)
    fields: dict[str, Any] = {entry.theirs: getattr(model, entry.ours) for entry in COMMON} | {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "dtype": dtype,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "use_cache": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }
    config = {name: fields[name] for name in _ORDER} | {
        **write_rope(model, architecture.rope, origin),
        "layer_types": architecture.their_layer_types(model),
        "bos_token_id": _token(origin.get("bos_token_id"), model),
        "eos_token_id": _write_eos(origin.get("eos_token_id"), model),
        "pad_token_id": model.pad_token_id,
    }
    config |= {name: value for name, value in origin.items() if name in KEPT | {*architecture.fields.kept}}
    if model.attention_head_dim * model.num_attention_heads != model.hidden_size:
        config["head_dim"] = model.attention_head_dim
    return architecture.whole_config(config | architecture.write(model, positions), whole_origin)


def language_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's fields of a config.json, all on one level."""
    architecture = ARCHITECTURES.get(config.get("model_type", ""))
    return architecture.language_config(config) if architecture else config


def _write_eos(ends: object, model: ModelConfig) -> int | Sequence[int] | None:
    """Return the original model's list of end tokens if it contains this model's, else this model's."""
    return ends if isinstance(ends, list) and model.eos_token_id in ends else model.eos_token_id


def _token(token: object, model: ModelConfig) -> int | None:
    return token if type(token) is int and 0 <= token < model.vocab_size else None
