"""Fields of transformers' config.json: which exist, what becomes of each, and a reader that checks their types.

Every field is mapped to ModelConfig, required to have one value, kept for exports, or left out. Any other field is refused,
because its effect on the model is unknown. The tables here hold for all architectures; each adds its own `FieldTable`.

Sources: PreTrainedConfig of transformers 4.57 to 5.23, and fields that Unsloth, PEFT, TRL, Axolotl, vLLM and the hub's tools
add.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_GENERATION = {
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids",
    "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "max_new_tokens",
    "assistant_confidence_threshold", "assistant_lookbehind", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "target_lookbehind",
}  # fmt: skip
KEPT = _GENERATION | {
    "use_cache", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id",
    "tokenizer_class", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "prefix", "model_max_length", "classifier_dropout", "tie_last_hidden_states", "chunk_size_feed_forward",
    "transformers.js_config",
}  # fmt: skip
"""Fields that change no logit but that users of the model need. An export contains them again."""
LEFT_OUT = {
    "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path", "_commit_hash", "auto_map",
    "custom_pipelines", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "_experts_implementation", "_experts_implementation_internal", "experts_implementation",
    "output_hidden_states", "output_attentions", "output_scores", "return_dict", "use_return_dict",
    "return_dict_in_generate", "gradient_checkpointing", "torchscript", "use_bfloat16", "xla_device", "is_decoder",
    "loss_type", "neftune_noise_alpha", "base_model_name_or_path", "distributed_config", "base_model_tp_plan",
    "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan", "chat_template", "license",
}  # fmt: skip
"""Fields that change no logit and that describe the file or the process that wrote it."""
_LEFT_OUT_PREFIXES = ("unsloth_", "_unsloth_", "axolotl_")
REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_encoder_decoder": (False, None),
    "cross_attention_hidden_size": (None,),
    "is_causal": (True, None),
    "partial_rotary_factor": (1, None),
    "original_max_position_embeddings": (None,),
    "pretraining_tp": (1, None),
    "clip_qkv": (None,),
    "pruned_heads": (None, {}),
    "per_layer_config": (None, {}),
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
    "transformers_weights": (None,),
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "fusion_config": (None, {}),
    "text_config": (None,),
}
"""Fields of which ModelConfig can represent only these values."""
_REMEDIES = {"quantization_config": "; convert the weights as they were before they were quantized"}

CONVERTED = {
    "model_type": "the architecture",
    "architectures": "the architecture",
    "num_hidden_layers": "layer_pattern",
    "layer_types": "layer_pattern",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_parameters": "rope_theta and rope_scaling",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "max_position_embeddings": "rope_scaling; an export states the longest sequence of training",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "nothing; an export contains it again",
}
"""Fields that code converts (config.py, rope.py), with what they determine."""


@dataclass(frozen=True)
class Mapped:
    """A field of config.json with the same meaning and values as a field of ModelConfig."""

    theirs: str
    ours: str
    kind: type
    default: Any = ...
    """Value of an absent or null field: a constant or a function of the other fields. `...`: it must be there."""

    def read(self, fields: "Fields") -> Any:
        """Return the value in config.json."""
        default = self.default(fields) if callable(self.default) else self.default
        return (
            fields.number(self.theirs, default) if self.kind is float else fields.get(self.theirs, self.kind, default)
        )


COMMON = (
    Mapped("vocab_size", "vocab_size", int),
    Mapped("hidden_size", "hidden_size", int),
    Mapped("intermediate_size", "ffn_hidden_size", int),
    Mapped("num_attention_heads", "num_attention_heads", int),
    Mapped("rms_norm_eps", "norm_eps", float),
    Mapped("tie_word_embeddings", "tie_embeddings", bool, False),
    Mapped("initializer_range", "init_std", float, 0.02),
)
"""Fields that all architectures map."""


@dataclass(frozen=True)
class FieldTable:
    """The fields that an architecture adds to the common ones, and its defaults."""

    converted: Mapping[str, str] = field(default_factory=dict)
    """Fields that the architecture's code converts, with what they determine."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Fields of which ModelConfig can represent only these values."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Fields without effect on the model, with the reason."""
    kept: Mapping[str, str] = field(default_factory=dict)
    """Fields without effect on the language model that an export contains again, with the reason."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers takes for absent fields. Rotary embedding has none: it differs between versions."""

    @property
    def all_required(self) -> dict[str, tuple[Any, ...]]:
        """Fields that must have one of these values, the common ones included, except for those that this architecture converts."""
        common = {name: values for name, values in REQUIRED.items() if name not in self.converted}
        return {**common, **self.required}

    def tables(self) -> list[set[str]]:
        """Return the disjoint sets of names that make up all known fields."""
        mapped = {entry.theirs for entry in COMMON}
        own = {*self.converted}, {*self.required}, {*self.ignored}, {*self.kept}
        return [mapped, {*CONVERTED}, {*REQUIRED} - {*self.converted}, KEPT, LEFT_OUT, *own]


class Fields:
    """config.json, read field by field. Collects problems, notes for the user, and the defaults that were taken."""

    def __init__(self, config: dict[str, Any], table: FieldTable) -> None:
        self.config, self.table = config, table
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.defaults: dict[str, Any] = {}

    def check_known(self) -> None:
        """Add a problem for each field that is unknown or holds a value that cannot be represented."""
        known = set().union(*self.table.tables())
        for name in sorted(self.config.keys() - known):
            if not name.startswith(_LEFT_OUT_PREFIXES):
                self.problems.append(
                    f"unknown field {name!r:.100} = {self.config[name]!r:.100}; its effect is not known; remove it if the "
                    "model does not need it"
                )
        for name, values in self.table.all_required.items():
            if name in self.config and self.config[name] not in values:
                self.problems.append(
                    f"{name} = {self.config[name]!r:.100} cannot be represented; only {values[0]!r} can"
                    f"{_REMEDIES.get(name, '')}"
                )

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a field's value if it has one of these types, or else None and add a problem.

        Args:
            default: value of a null field, and of an absent one for which transformers has no default. `...`: none.
        """
        value = self.config.get(name)
        if name not in self.config and name in self.table.defaults:
            self.defaults[name] = self.table.defaults[name]
            return self.defaults[name]
        if value is None:
            if default is ...:
                self.problems.append(f"{name} is missing" if name not in self.config else f"{name} is null")
            return None if default is ... else default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            self.problems.append(f"{name} is {value!r:.100}, not {' or '.join(k.__name__ for k in kinds)}")
            return None
        return value

    def number(self, name: str, default: Any = ...) -> float | None:
        """Return a field as a float, because JSON may say 1 for 1.0. Otherwise as `get`."""
        value = self.get(name, (int, float), default)
        try:
            return None if value is None else float(value)
        except OverflowError:
            self.problems.append(f"{name} is out of range")
            return None


Default = Callable[[Fields], Any]
"""A default that depends on other fields."""
