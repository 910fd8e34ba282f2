"""transformers' config.json of `olmo_hybrid` and `olmo3` to a ModelConfig, every field accounted for.

A field is used, or known to have no effect on what the weights compute, or refused. A value that ModelConfig cannot say
is refused too.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig, fold_pattern
from megatron_hybrid.config.translate import translate
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf_fields import Fields
from megatron_hybrid.convert.hf_rope import rope_from_hf

ARCHITECTURES = {"olmo_hybrid": "OlmoHybridForCausalLM", "olmo3": "Olmo3ForCausalLM"}
LAYER_TYPES = {"linear_attention": "G", "full_attention": "A", "sliding_attention": "W"}
OUTPUT_NORM_EPS = 1e-5
"""Fixed in transformers: no field of config.json says it."""


@dataclass(frozen=True)
class ReadConfig:
    """What a config.json says."""

    model: ModelConfig
    notes: tuple[str, ...]
    """Remarks for the user."""
    defaults: dict[str, Any]
    """Fields that are absent, and what transformers takes for them."""


def model_from_hf(config: dict[str, Any], eos_token_id: int | None = None) -> ModelConfig:
    """The model that a config.json describes; see `read_config`."""
    return read_config(config, eos_token_id).model


def read_config(config: dict[str, Any], eos_token_id: int | None = None) -> ReadConfig:
    """Read a config.json.

    Args:
        eos_token_id: which one to take where config.json lists several.

    Raises:
        ConversionError: lists every field that is unknown, missing, or not representable.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConversionError(f"config.json: model_type {kind!r:.100} is not one of {', '.join(ARCHITECTURES)}")
    fields = Fields(config, kind)
    fields.check_known()
    architectures = config.get("architectures")
    if architectures not in (None, [ARCHITECTURES[kind]]):
        fields.problems.append(f"architectures is {architectures!r:.200}, not [{ARCHITECTURES[kind]!r}]")
    model = _model_fields(fields, eos_token_id)
    if fields.problems:
        raise ConversionError("config.json: " + "; ".join(fields.problems[:10]))
    try:
        return ReadConfig(ModelConfig.model_validate(_floats(model)), tuple(fields.notes), fields.defaults)
    except OverflowError:
        raise ConversionError("config.json: a number is out of range") from None
    except ValidationError as error:
        raise ConversionError(f"config.json: {str(translate(error, ModelConfig))[:2000]}") from None


def _model_fields(fields: Fields, eos_token_id: int | None) -> dict[str, Any]:
    """The fields of ModelConfig; complaints are added to `fields`."""
    layers = _layers(fields)
    heads, vocabulary = fields.get("num_attention_heads", int, ...), fields.get("vocab_size", int, ...)
    theta, scaling = rope_from_hf(fields, layers)
    model: dict[str, Any] = {
        "layer_pattern": fold_pattern(layers) if layers else None,
        "hidden_size": fields.get("hidden_size", int, ...),
        "ffn_hidden_size": fields.get("intermediate_size", int, ...),
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads", int),
        "head_dim": fields.get("head_dim", int),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": fields.get("rms_norm_eps", (int, float), ...),
        "tie_embeddings": fields.get("tie_word_embeddings", bool, False),
        "init_std": fields.get("initializer_range", (int, float), 0.02),
        "eos_token_id": _eos(fields, eos_token_id, vocabulary),
        "pad_token_id": _in_vocabulary(fields, "pad_token_id", fields.get("pad_token_id", int), vocabulary),
        "gdn": _gdn(fields, heads) if "G" in layers else None,
        "sliding_window": fields.get("sliding_window", int, ...) if "W" in layers else None,
    }
    if model["num_key_value_heads"] == heads:
        model["num_key_value_heads"] = None
    if heads and model["hidden_size"] == heads * (model["head_dim"] or 0):
        model["head_dim"] = None
    return model


def _floats(model: dict[str, Any]) -> dict[str, Any]:
    """JSON may say 1 for 1.0; ModelConfig, which is strict, may not."""
    floats = {"rope_theta", "norm_eps", "init_std"}
    return {name: float(value) if name in floats and value is not None else value for name, value in model.items()}


def _layers(fields: Fields) -> list[str]:
    count, kind = fields.get("num_hidden_layers", int, ...), fields.kind
    types, indices = fields.config.get("layer_types"), fields.config.get("fla_hybrid_attention_indices")
    if count is None or not 0 < count <= 4096:
        fields.problems.append(f"num_hidden_layers {count!r} is not from 1 to 4096")
        return []
    if types is None and isinstance(indices, list) and all(type(i) is int for i in indices):
        attention = set(indices)
        types = ["full_attention" if i in attention else "linear_attention" for i in range(count)]
    elif indices is not None and indices != [
        i for i, t in enumerate(types if isinstance(types, list) else []) if t == "full_attention"
    ]:
        fields.problems.append("fla_hybrid_attention_indices does not say the same as layer_types")
    known = ("linear_attention", "full_attention") if kind == "olmo_hybrid" else ("sliding_attention", "full_attention")
    if types is None:  # transformers' default: every fourth layer sees everything
        types = [known[(i + 1) % 4 == 0] for i in range(count)]
        if kind == "olmo_hybrid" and count < 4:
            types[-1] = "full_attention"
    if not isinstance(types, list) or len(types) != count or any(t not in known for t in types):
        fields.problems.append(
            f"layer_types is not a list of num_hidden_layers = {count} times {' or '.join(known)}: {types!r:.200}"
        )
        return []
    return [LAYER_TYPES[t] for t in types]


def _eos(fields: Fields, chosen: int | None, vocabulary: int | None) -> int | None:
    value = fields.get("eos_token_id", (int, list))
    values = value if isinstance(value, list) else [value]
    if chosen is not None:
        return chosen
    if len(values) != 1 or isinstance(values[0], bool) or not isinstance(values[0], int | None):
        fields.problems.append(f"eos_token_id lists {values!r:.100}; say which one ends a document: --eos-token-id N")
        return None
    return _in_vocabulary(fields, "eos_token_id", values[0], vocabulary)


def _in_vocabulary(fields: Fields, name: str, token: int | None, vocabulary: int | None) -> int | None:
    """The token; None where it is transformers' default and the vocabulary is smaller."""
    taken_as_default = name in fields.defaults
    return None if taken_as_default and token is not None and vocabulary is not None and token >= vocabulary else token


def _gdn(fields: Fields, heads: int | None) -> dict[str, Any]:
    """transformers' defaults for what is absent: as many heads as the attention's, keys 3/4 of the hidden size."""
    key_heads = fields.get("linear_num_key_heads", int, heads)
    hidden = fields.config.get("hidden_size")
    default_dim = (
        int(0.75 * hidden / key_heads)
        if isinstance(hidden, int) and key_heads and 0 < key_heads < 1 << 31 > hidden
        else None
    )
    key_dim = fields.get("linear_key_head_dim", int, default_dim)
    return {
        "num_key_heads": key_heads,
        "num_value_heads": fields.get("linear_num_value_heads", int, heads),
        "key_head_dim": key_dim,
        "value_head_dim": fields.get("linear_value_head_dim", int, 2 * key_dim if key_dim else None),
        "conv_kernel_size": fields.get("linear_conv_kernel_dim", int, 4),
        "allow_negative_eigenvalues": fields.get("linear_allow_neg_eigval", bool, True),
        "norm_eps": OUTPUT_NORM_EPS,
        "a_init_range": [_float(fields, "linear_a_log_min", 0.0), _float(fields, "linear_a_log_max", 16.0)],
        "dt_init_range": [_float(fields, "linear_dt_min", 1e-3), _float(fields, "linear_dt_max", 0.1)],
        "dt_init_floor": _float(fields, "linear_dt_init_floor", 1e-4),
    }


def _float(fields: Fields, name: str, default: float) -> float:
    value = fields.get(name, (int, float), default)
    try:
        return default if value is None else float(value)
    except OverflowError:
        fields.problems.append(f"{name} is out of range")
        return default
