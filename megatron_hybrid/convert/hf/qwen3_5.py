"""Qwen3.5, dense: pre-norm layers of Gated DeltaNet and gated attention.

`Qwen3_5ForCausalLM` has text alone. `Qwen3_5ForConditionalGeneration` is the same language model next to a vision tower, whose
tensors are kept for exports.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megatron_hybrid.arch.blocks import Block, Blocks
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.base import Architecture
from megatron_hybrid.convert.hf.fields import KEPT, LEFT_OUT, Fields, FieldTable, Mapped
from megatron_hybrid.convert.hf.names import LayerNames, Packed, each
from megatron_hybrid.convert.hf.rope import RopeForms
from megatron_hybrid.mixers.gated_delta_net.spec import sizes

LINEAR, FULL = "linear_attention", "full_attention"
INTERVAL, FACTOR, GATE = "full_attention_interval", "partial_rotary_factor", "attn_output_gate"
DEFAULT_FACTOR = 0.25
ATTENTION = Block(mixer="attention", title="gated attention", norm="pre", qk_norm="per_head", output_gate=True)
"""Block of its attention layers, but for the partial rotary factor."""

_GATED_DELTA_NET = (
    Mapped("linear_num_key_heads", "num_key_heads", int),
    Mapped("linear_num_value_heads", "num_value_heads", int),
    Mapped("linear_key_head_dim", "key_head_dim", int),
    Mapped("linear_value_head_dim", "value_head_dim", int),
    Mapped("linear_conv_kernel_dim", "conv_kernel_size", int),
)
_COMMON = {
    **each(("gate", "up", "down"), "mlp.{}_proj.weight", "mlp.{}_proj.weight"),
    "mixer_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
}
_LINEAR_LAYER = LayerNames(
    names={
        **each("ab", "gdn.{}_proj.weight", "linear_attn.in_proj_{}.weight"),
        "gdn.gate_proj.weight": "linear_attn.in_proj_z.weight",
        "gdn.o_proj.weight": "linear_attn.out_proj.weight",
        "gdn.o_norm.weight": "linear_attn.norm.weight",
        **each(("A_log", "dt_bias"), "gdn.{}", "linear_attn.{}"),
        **_COMMON,
    },
    packed={
        "linear_attn.in_proj_qkv.weight": Packed(tuple(f"gdn.{name}_proj.weight" for name in "qkv")),
        "linear_attn.conv1d.weight": Packed(tuple(f"gdn.{name}_conv.weight" for name in "qkv"), convolution=True),
    },
)
_FULL_LAYER = LayerNames(
    names={
        **each("kvo", "attention.{}_proj.weight", "self_attn.{}_proj.weight"),
        **each("qk", "attention.{}_norm.weight", "self_attn.{}_norm.weight"),
        **_COMMON,
    },
    packed={
        "self_attn.q_proj.weight": Packed(
            ("attention.q_proj.weight", "attention.gate_proj.weight"), heads="num_attention_heads"
        )
    },
)


class Qwen35Text(Architecture):
    """`Qwen3_5ForCausalLM` of transformers."""

    model_type = "qwen3_5_text"
    class_name = "Qwen3_5ForCausalLM"
    layer_types = {LINEAR: "G", FULL: "A"}
    old_layer_types = {"mamba": LINEAR, "attention": FULL}
    fields = FieldTable(
        converted={
            INTERVAL: "layer_pattern",
            FACTOR: "blocks.A.partial_rotary_factor",
            **{entry.theirs: f"gdn.{entry.ours}" for entry in _GATED_DELTA_NET},
        },
        required={"mlp_only_layers": ([], None)},
        kept={
            GATE: "this class has no other attention",
            "mtp_num_hidden_layers": "multi-token prediction is not part of the language model",
            "mtp_use_dedicated_embeddings": "multi-token prediction is not part of the language model",
            "mamba_ssm_dtype": "inference engines read it",
        },
        defaults={
            "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
            "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
            "tie_word_embeddings": False, "max_position_embeddings": 32768, "linear_num_key_heads": 16,
            "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
            "eos_token_id": None, "pad_token_id": None,
        },
    )  # fmt: skip
    rope = RopeForms(
        optional=False, per_layer_type=False, partial=True, kept=frozenset({"mrope_section", "mrope_interleaved"})
    )
    layers = {"G": _LINEAR_LAYER, "A": _FULL_LAYER}
    other_prefixes: ClassVar[tuple[str, ...]] = ("model.language_model.",)
    kept_tensors = re.compile(r"mtp\..*")
    zero_centered_norm = True

    def blocks(self, model: ModelConfig) -> Blocks:
        """Return its blocks, attention with the model's partial rotary factor."""
        attention = ATTENTION.model_copy(update={"partial_rotary_factor": model.rotary_factor})
        return {**super().blocks(model), "A": attention}

    def unsupported_reason(self, model: ModelConfig) -> str | None:
        """Return why this architecture cannot compute a model, or None if it can."""
        if not set(model.layers) <= {"G", "A"}:
            return f"model.layer_pattern = {model.layer_pattern} has other layers than G and A"
        if model.rope_theta is None:
            return "model.rope_theta is null, and this class always has rotary embedding"
        if "G" not in model.layers:
            return None
        gdn = sizes(model)
        if gdn.allow_negative_eigenvalues:
            return "model.gdn.allow_negative_eigenvalues is true, and this class has positive eigenvalues only"
        if gdn.norm_eps != model.norm_eps:
            return f"model.gdn.norm_eps = {gdn.norm_eps} differs from model.norm_eps = {model.norm_eps}, and this class has one"
        return None

    def default_layer_types(self, count: int) -> list[str]:
        """Return full attention in every fourth layer."""
        return _every(4, count)

    def read_layer_types(self, fields: Fields, count: int) -> Any:
        """Return the type of each layer. `full_attention_interval` has an effect only without `layer_types`."""
        interval = fields.get(INTERVAL, int, 4)
        if fields.config.get("layer_types") is None and interval is not None and interval > 0:
            return _every(interval, count)
        return super().read_layer_types(fields, count)

    def read(self, fields: Fields, layer_types: Sequence[str]) -> dict[str, Any]:
        """Return the kind of norms, the attention block and the section of the Gated DeltaNet layers."""
        model: dict[str, Any] = {"zero_centered_norm": True}
        if fields.config.get(GATE, True) is not True:
            fields.problems.append(f"{GATE} = {fields.config[GATE]!r:.100} cannot be represented; only true can")
        if FULL in layer_types:
            attention = ATTENTION.model_dump() | {"partial_rotary_factor": _rotary_factor(fields)}
            model["blocks"] = {"A": attention}
        if LINEAR in layer_types:
            section = {entry.ours: entry.read(fields) for entry in _GATED_DELTA_NET}
            eps = fields.number("rms_norm_eps")
            model["gdn"] = section | {"norm_eps": eps, "allow_negative_eigenvalues": False}
        return model

    def write(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the head size, which has a default here, and the fields of the Gated DeltaNet layers."""
        fields: dict[str, Any] = {"head_dim": model.attention_head_dim}
        if model.section("gdn") is not None:
            gdn = sizes(model)
            fields |= {entry.theirs: getattr(gdn, entry.ours) for entry in _GATED_DELTA_NET}
        return fields

    def card_rows(self, model: ModelConfig) -> dict[str, str]:
        """Return the heads of the Gated DeltaNet layers."""
        if "G" not in model.layers:
            return {}
        gdn = sizes(model)
        keys = f"{gdn.num_key_heads} key heads of {gdn.key_head_dim}"
        return {"Gated DeltaNet": f"{keys}, {gdn.num_value_heads} value heads of {gdn.value_head_dim}"}


def _every(interval: int, count: int) -> list[str]:
    return [LINEAR if (index + 1) % interval else FULL for index in range(count)]


def _rotary_factor(fields: Fields) -> Any:
    """Return the share of channels that are rotated. transformers takes a factor next to rope_parameters only if it has none."""
    parameters = fields.config.get("rope_parameters")
    stated = [
        part[FACTOR] for part in (parameters, fields.config) if isinstance(part, dict) and part.get(FACTOR) is not None
    ]
    factor = stated[0] if stated else DEFAULT_FACTOR
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        fields.problems.append(f"{FACTOR} is {factor!r:.100}, not a number")
        return None
    if any(other != factor for other in stated):
        fields.problems.append(f"{FACTOR} is given as {stated!r:.100}; remove the wrong one")
    return float(factor)


_VISION_FIELDS = {
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
}  # fmt: skip
_OUTER = {"architectures", "model_type", "text_config", "tie_word_embeddings", *_VISION_FIELDS}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Qwen35(Qwen35Text):
    """`Qwen3_5ForConditionalGeneration` of transformers: its language model, in `text_config`."""

    model_type = "qwen3_5"
    class_name = "Qwen3_5ForConditionalGeneration"
    prefix = "model.language_model."
    other_prefixes = ()
    kept_tensors = re.compile(r"(mtp|model\.visual)\..*")

    def language_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of `text_config`. Whether embeddings are tied is decided by the field around it.

        Raises:
            ConversionError: no `text_config`, an unknown field around it, or one that contradicts it.
        """
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ConversionError("config.json: text_config is missing, or not an object")
        unknown = sorted(config.keys() - _OUTER - KEPT - LEFT_OUT - {*_TOKENS})
        if unknown:
            raise ConversionError(
                f"config.json: unknown field {unknown[0]!r:.100} around text_config; its effect is not known"
            )
        outer = {name: config[name] for name in _TOKENS if name in config}
        tied = config.get("tie_word_embeddings", False)
        if text.get("tie_word_embeddings", tied) != tied:
            raise ConversionError(
                f"config.json: tie_word_embeddings is {tied!r:.20}, and {text['tie_word_embeddings']!r:.20} in text_config; make "
                "them agree"
            )
        return {**outer, **text, "architectures": config.get("architectures"), "tie_word_embeddings": tied}

    def whole_config(self, config: dict[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json with the language model's fields in `text_config` and the original model's around them."""
        if "vision_config" not in origin:
            raise ConversionError(
                f"config.json: the original model has no vision tower, which {self.class_name} needs; export {Qwen35Text.class_name}"
            )
        around = {name: origin[name] for name in origin if name in _VISION_FIELDS | KEPT}
        text = {name: value for name, value in config.items() if name != "architectures"}
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "dtype": config["dtype"],
            "text_config": text | {"model_type": Qwen35Text.model_type},
            "tie_word_embeddings": config["tie_word_embeddings"],
            **around,
        }
