"""Fields of transformers' config.json: which are used, which change no logit, which allow a single value.

Sources: OlmoHybridConfig, Olmo3Config and PreTrainedConfig of transformers 4.57 to 5.23, and fields that Unsloth, PEFT, TRL,
Axolotl, vLLM and the hub's tools add. A field that none of these lists names is refused: what it changes is not known.
"""

from typing import Any

USED = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "rope_parameters", "rope_theta", "rope_scaling", "layer_types", "fla_hybrid_attention_indices", "sliding_window",
    "eos_token_id", "pad_token_id", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "linear_conv_kernel_dim", "linear_allow_neg_eigval", "linear_a_log_min", "linear_a_log_max",
    "linear_dt_min", "linear_dt_max", "linear_dt_init_floor", "max_position_embeddings", "bos_token_id",
}  # fmt: skip
_GENERATION = {
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids",
    "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
    "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "max_new_tokens",
    "assistant_confidence_threshold", "assistant_lookbehind", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "target_lookbehind",
}  # fmt: skip
WRITTEN_BACK = _GENERATION | {
    "use_cache", "sep_token_id", "cls_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id",
    "tokenizer_class", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    "prefix", "model_max_length", "classifier_dropout", "tie_last_hidden_states", "chunk_size_feed_forward",
    "transformers.js_config",
}  # fmt: skip
"""Fields that change no logit, and that users of the model need: an export has them again."""
LEFT_OUT = {
    "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path", "_commit_hash", "auto_map",
    "custom_pipelines", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "_experts_implementation", "_experts_implementation_internal", "experts_implementation",
    "output_hidden_states", "output_attentions", "output_scores", "return_dict", "use_return_dict",
    "return_dict_in_generate", "gradient_checkpointing", "torchscript", "use_bfloat16", "xla_device", "is_decoder",
    "loss_type", "neftune_noise_alpha", "base_model_name_or_path", "distributed_config", "base_model_tp_plan",
    "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan", "chat_template", "license",
}  # fmt: skip
"""Fields that change no logit, and that speak of the file or of the process that wrote it."""
_LEFT_OUT_PREFIXES = ("unsloth_", "_unsloth_", "axolotl_")
ONLY: dict[str, tuple[Any, ...]] = {
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
    "linear_use_gate": (True,),
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
"""Fields of which we can represent these values alone."""
_REMEDIES = {
    "quantization_config": "; convert the weights as they were before they were quantized",
    "hidden_act": "",
}

_COMMON = {
    "intermediate_size": 11008, "num_hidden_layers": 32, "initializer_range": 0.02, "tie_word_embeddings": False,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "olmo_hybrid": _COMMON | {
        "vocab_size": 100352, "hidden_size": 3840, "num_attention_heads": 30, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 65536, "eos_token_id": 100257, "pad_token_id": 100277,
    },
    "olmo3": _COMMON | {
        "vocab_size": 50304, "hidden_size": 4096, "num_attention_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096,
        "max_position_embeddings": 2048, "eos_token_id": 50279, "pad_token_id": 1,
    },
}  # fmt: skip
"""What transformers takes for an absent field, by model_type. Rotary embedding has none: it differs between versions."""


class Fields:
    """config.json, read field by field; remembers what is wrong, and which defaults were taken."""

    def __init__(self, config: dict[str, Any], kind: str):
        self.config, self.kind = config, kind
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.defaults: dict[str, Any] = {}

    def check_known(self) -> None:
        """Add a problem for each field that is unknown or holds a value that cannot be represented."""
        known = USED | WRITTEN_BACK | LEFT_OUT | ONLY.keys()
        for name in sorted(self.config.keys() - known):
            if not name.startswith(_LEFT_OUT_PREFIXES):
                self.problems.append(
                    f"unknown field {name!r:.100} = {self.config[name]!r:.100}; what it changes is not known here; remove "
                    "it if the model does not need it"
                )
        for name, values in ONLY.items():
            if name in self.config and self.config[name] not in values:
                self.problems.append(
                    f"{name} = {self.config[name]!r:.100} cannot be represented; only {values[0]!r} can"
                    f"{_REMEDIES.get(name, '')}"
                )

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The field's value if it is of this type; where it is absent or null, transformers' default, else `default`.

        `default=...`: the field must not be null.
        """
        value = self.config.get(name)
        if name not in self.config and name in DEFAULTS[self.kind]:
            self.defaults[name] = DEFAULTS[self.kind][name]
            return self.defaults[name]
        if value is None:
            if default is ...:
                self.problems.append(f"{name} is missing" if name not in self.config else f"{name} is null")
            return None if default is ... else default
        wanted = kind if isinstance(kind, tuple) else (kind,)
        if (isinstance(value, bool) and bool not in wanted) or not isinstance(value, wanted):
            self.problems.append(f"{name} is {value!r:.100}, not {' or '.join(k.__name__ for k in wanted)}")
            return None
        return value
