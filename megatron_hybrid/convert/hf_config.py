"""transformers' config.json of `olmo_hybrid` and `olmo3` to a ModelConfig, every field accounted for.

A field is used, or known to have no effect on what the weights compute, or refused. A value that ModelConfig cannot say
is refused too.
"""

from typing import Any

from pydantic import ValidationError

from megatron_hybrid.config.model import ModelConfig, fold_pattern
from megatron_hybrid.config.translate import translate
from megatron_hybrid.convert.errors import ConversionError

ARCHITECTURES = {"olmo_hybrid": "OlmoHybridForCausalLM", "olmo3": "Olmo3ForCausalLM"}
LAYER_TYPES = {"linear_attention": "G", "full_attention": "A", "sliding_attention": "W"}
OUTPUT_NORM_EPS = 1e-5
"""Fixed in transformers: no field of config.json says it."""

_USED = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "rope_theta", "rope_scaling", "layer_types", "fla_hybrid_attention_indices", "sliding_window",
    "eos_token_id", "pad_token_id", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "linear_conv_kernel_dim", "linear_allow_neg_eigval", "linear_a_log_min", "linear_a_log_max",
    "linear_dt_min", "linear_dt_max", "linear_dt_init_floor",
}  # fmt: skip
_NO_EFFECT = {
    "transformers_version", "torch_dtype", "dtype", "use_cache", "bos_token_id", "max_position_embeddings", "_name_or_path",
    "_attn_implementation", "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward", "id2label",
    "label2id", "num_labels", "problem_type", "_attn_implementation_autoset",
}  # fmt: skip
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "is_encoder_decoder": (False, None),
    "linear_use_gate": (True,),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "clip_qkv": (None,),
}
"""Fields of which we can represent these values alone."""


class _Fields:
    """config.json, read field by field; remembers what is wrong."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.problems: list[str] = []

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The field's value of this type; `default` where it is absent or null (absent is an error where that is `...`)."""
        value = self.config.get(name)
        if value is None:
            if default is ...:
                self.problems.append(f"{name} is missing")
            return None if default is ... else default
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if (isinstance(value, bool) and bool not in wanted) or not isinstance(value, wanted):
            self.problems.append(f"{name} is {value!r:.100}, not {' or '.join(k.__name__ for k in wanted)}")
            return None
        return value


def model_from_hf(config: dict[str, Any], eos_token_id: int | None = None) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        eos_token_id: which one to take where config.json lists several.

    Raises:
        ConversionError: lists every field that is unknown, missing, or not representable.
    """
    fields = _Fields(config)
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConversionError(f"config.json: model_type {kind!r:.100} is not one of {', '.join(ARCHITECTURES)}")
    for name in sorted(config.keys() - _USED - _NO_EFFECT - _ONLY.keys()):
        fields.problems.append(
            f"unknown field {name!r:.100} = {config[name]!r:.100}; what it changes is not known here"
        )
    for name, values in _ONLY.items():
        if name in config and config[name] not in values:
            fields.problems.append(f"{name} = {config[name]!r:.100} cannot be represented; only {values[0]!r} can")
    architectures = config.get("architectures")
    if architectures not in (None, [ARCHITECTURES[kind]]):
        fields.problems.append(f"architectures is {architectures!r:.200}, not [{ARCHITECTURES[kind]!r}]")
    layers = _layers(fields, kind)
    heads = fields.get("num_attention_heads", int, ...)
    model: dict[str, Any] = {
        "layer_pattern": fold_pattern(layers) if layers else None,
        "hidden_size": fields.get("hidden_size", int, ...),
        "ffn_hidden_size": fields.get("intermediate_size", int, ...),
        "vocab_size": fields.get("vocab_size", int, ...),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads", int),
        "head_dim": fields.get("head_dim", int),
        "rope_theta": _rope_theta(fields, kind),
        "norm_eps": fields.get("rms_norm_eps", (int, float), ...),
        "tie_embeddings": fields.get("tie_word_embeddings", bool, False),
        "init_std": fields.get("initializer_range", (int, float), 0.02),
        "eos_token_id": _eos(fields, eos_token_id),
        "pad_token_id": fields.get("pad_token_id", int),
        "gdn": _gdn(fields, heads) if "G" in layers else None,
        "sliding_window": fields.get("sliding_window", int, ...) if "W" in layers else None,
    }
    if model["num_key_value_heads"] == heads:
        model["num_key_value_heads"] = None
    if heads and model["hidden_size"] == heads * (model["head_dim"] or 0):
        model["head_dim"] = None
    if fields.problems:
        raise ConversionError("config.json: " + "; ".join(fields.problems[:10]))
    try:
        return ModelConfig.model_validate(_floats(model))
    except OverflowError:
        raise ConversionError("config.json: a number is out of range") from None
    except ValidationError as error:
        raise ConversionError(f"config.json: {str(translate(error, ModelConfig))[:2000]}") from None


def _floats(model: dict[str, Any]) -> dict[str, Any]:
    """JSON may say 1 for 1.0; ModelConfig, which is strict, may not."""
    floats = {"rope_theta", "norm_eps", "init_std"}
    return {name: float(value) if name in floats and value is not None else value for name, value in model.items()}


def _layers(fields: _Fields, kind: str) -> list[str]:
    count = fields.get("num_hidden_layers", int, ...)
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
    if types is None and kind == "olmo3":  # as released: every fourth sees everything
        types = [known[(i + 1) % 4 == 0] for i in range(count)]
    if not isinstance(types, list) or len(types) != count or any(t not in known for t in types):
        fields.problems.append(
            f"layer_types is not a list of num_hidden_layers = {count} times {' or '.join(known)}: {types!r:.200}"
        )
        return []
    return [LAYER_TYPES[t] for t in types]


def _rope_theta(fields: _Fields, kind: str) -> float | None:
    """theta of a plain rotary embedding; None where there is none.

    `olmo_hybrid` without rotary embedding is said in three ways: `rope_parameters: null`, `rope_parameters: {"rope_theta":
    null}` and, by OLMo-core's exporter, `rope_theta: null`. A file that says nothing at all is not guessed about.
    """
    config = fields.config
    if config.get("rope_scaling") is not None:
        fields.problems.append(
            f"rope_scaling = {config['rope_scaling']!r:.200} cannot be represented; only plain rotary embedding can"
        )
        return None
    if "rope_parameters" not in config and "rope_theta" not in config:
        fields.problems.append(
            "neither rope_parameters nor rope_theta is there; add rope_parameters (null: no rotary embedding)"
        )
        return None
    parameters = config.get("rope_parameters")
    if parameters is None:
        found = [config.get("rope_theta")]
    elif isinstance(parameters, dict) and (nested := parameters.keys() & LAYER_TYPES.keys()):
        found = [_one_theta(fields, f"rope_parameters.{name}", parameters[name]) for name in sorted(nested)]
        flat = {name: value for name, value in parameters.items() if name not in nested}
        if flat:  # what transformers leaves beside the layer types where a plain form was given
            found.append(_one_theta(fields, "rope_parameters", flat))
    else:
        found = [_one_theta(fields, "rope_parameters", parameters)]
    theta = found[0]
    if any(other != theta for other in found):
        fields.problems.append(f"rope_parameters gives layers different theta: {found!r:.200}")
    elif theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float)):
        fields.problems.append(f"rope_theta {theta!r:.100} is not a number")
    elif theta is None and kind == "olmo3":
        fields.problems.append("rope_theta is null, and olmo3 always has rotary embedding")
    else:
        return theta
    return None


def _one_theta(fields: _Fields, where: str, parameters: object) -> Any:
    if not isinstance(parameters, dict):
        fields.problems.append(f"{where} is {parameters!r:.100}, not an object")
        return None
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    others = parameters.keys() - {"rope_theta", "rope_type", "type"}
    partial = parameters.get("partial_rotary_factor", 1)
    if kind not in ("default", None) or (others - {"partial_rotary_factor"}) or partial not in (1, None):
        fields.problems.append(f"{where} = {parameters!r:.200} cannot be represented; only plain rotary embedding can")
    if "rope_theta" not in parameters:
        fields.problems.append(f"{where}.rope_theta is missing")
    return parameters.get("rope_theta")


def _eos(fields: _Fields, chosen: int | None) -> int | None:
    value = fields.get("eos_token_id", (int, list))
    values = value if isinstance(value, list) else [value]
    if chosen is not None:
        return chosen
    if len(values) != 1 or isinstance(values[0], bool) or not isinstance(values[0], int | None):
        fields.problems.append(f"eos_token_id lists {values!r:.100}; say which one ends a document: --eos-token-id N")
        return None
    return values[0]


def _gdn(fields: _Fields, heads: int | None) -> dict[str, Any]:
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


def _float(fields: _Fields, name: str, default: float) -> float:
    value = fields.get(name, (int, float), default)
    try:
        return default if value is None else float(value)
    except OverflowError:
        fields.problems.append(f"{name} is out of range")
        return default
