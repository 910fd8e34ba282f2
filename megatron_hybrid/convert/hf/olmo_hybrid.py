"""OLMo Hybrid: pre-norm Gated DeltaNet layers and post-norm attention layers (`OlmoHybridForCausalLM`)."""

from collections.abc import Sequence
from typing import Any, ClassVar

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.convert.hf.base import Architecture
from megatron_hybrid.convert.hf.fields import Fields, FieldTable, Mapped
from megatron_hybrid.convert.hf.names import LayerNames, each
from megatron_hybrid.convert.hf.rope import RopeForms
from megatron_hybrid.mixers.gated_delta_net.spec import sizes

LINEAR, FULL = "linear_attention", "full_attention"
OUTPUT_NORM_EPS = 1e-5
"""Epsilon of the gated output norm. transformers fixes it; config.json has no field for it."""
_INDICES = "fla_hybrid_attention_indices"
_HUGE = 1 << 31


def _attention_heads(fields: Fields) -> Any:
    return fields.get("num_attention_heads", int)


def _key_head_dim(fields: Fields) -> int | None:
    """Return the default key head dim: keys of three quarters of the hidden size."""
    hidden, heads = fields.config.get("hidden_size"), fields.get("linear_num_key_heads", int, _attention_heads(fields))
    if not isinstance(hidden, int) or hidden >= _HUGE or not heads or not 0 < heads < _HUGE:
        return None
    return int(0.75 * hidden / heads)


def _value_head_dim(fields: Fields) -> int | None:
    key = fields.get("linear_key_head_dim", int, _key_head_dim(fields))
    return 2 * key if key else None


_GATED_DELTA_NET = (
    Mapped("linear_num_key_heads", "num_key_heads", int, _attention_heads),
    Mapped("linear_num_value_heads", "num_value_heads", int, _attention_heads),
    Mapped("linear_key_head_dim", "key_head_dim", int, _key_head_dim),
    Mapped("linear_value_head_dim", "value_head_dim", int, _value_head_dim),
    Mapped("linear_conv_kernel_dim", "conv_kernel_size", int, 4),
    Mapped("linear_allow_neg_eigval", "allow_negative_eigenvalues", bool, True),
)
_RANGES = (
    (Mapped("linear_a_log_min", "a_init_range", float, 0.0), Mapped("linear_a_log_max", "a_init_range", float, 16.0)),
    (Mapped("linear_dt_min", "dt_init_range", float, 1e-3), Mapped("linear_dt_max", "dt_init_range", float, 0.1)),
)
_FLOOR = Mapped("linear_dt_init_floor", "dt_init_floor", float, 1e-4)

_MLP = each(("gate", "up", "down"), "mlp.{}_proj.weight", "mlp.{}_proj.weight")
_LINEAR_LAYER = LayerNames(
    names={
        **each("qkvabo", "gdn.{}_proj.weight", "linear_attn.{}_proj.weight"),
        "gdn.gate_proj.weight": "linear_attn.g_proj.weight",
        **each("qkv", "gdn.{}_conv.weight", "linear_attn.{}_conv1d.weight"),
        **each(("A_log", "dt_bias", "o_norm.weight"), "gdn.{}", "linear_attn.{}"),
        **_MLP,
        "mixer_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
    },
    spellings={
        # released checkpoints, and files that transformers' save_pretrained wrote
        "attention_layer_norm.weight": "input_layernorm.weight",
        "feedforward_layer_norm.weight": "post_attention_layernorm.weight",
        # OLMo-core 3.0.0's exporter
        "linear_attn.out_proj.weight": "linear_attn.o_proj.weight",
        "linear_attn.norm.weight": "linear_attn.o_norm.weight",
    },
    # transformers joins them on load, and its save_pretrained splits them into equal thirds
    convolutions={"linear_attn.conv1d.weight": ("gdn.q_conv.weight", "gdn.k_conv.weight", "gdn.v_conv.weight")},
)
_FULL_LAYER = LayerNames(
    names={
        **each("qkvo", "attention.{}_proj.weight", "self_attn.{}_proj.weight"),
        **each("qk", "attention.{}_norm.weight", "self_attn.{}_norm.weight"),
        **_MLP,
        "mixer_norm.weight": "post_attention_layernorm.weight",
        "mlp_norm.weight": "post_feedforward_layernorm.weight",
    },
    # save_pretrained reverses the renames of its linear layers in all layers
    spellings={"feedforward_layer_norm.weight": "post_attention_layernorm.weight"},
)


class OlmoHybrid(Architecture):
    """`OlmoHybridForCausalLM` of transformers."""

    model_type = "olmo_hybrid"
    class_name = "OlmoHybridForCausalLM"
    layer_types = {LINEAR: "G", FULL: "A"}
    old_layer_types = {"mamba": LINEAR, "attention": FULL}
    fields = FieldTable(
        converted={
            _INDICES: "layer_pattern",
            **{entry.theirs: f"gdn.{entry.ours}" for entry in (*_GATED_DELTA_NET, *_RANGES[0], *_RANGES[1], _FLOOR)},
        },
        required={"linear_use_gate": (True,)},
        ignored={"sliding_window": "this architecture has no sliding window layers"},
        defaults={
            "vocab_size": 100352, "hidden_size": 3840, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 30, "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False,
            "max_position_embeddings": 65536, "eos_token_id": 100257, "pad_token_id": 100277,
        },
    )  # fmt: skip
    vllm_flags = "--enforce-eager --disable-cascade-attn"
    rope = RopeForms(optional=True, per_layer_type=False)
    layers = {"G": _LINEAR_LAYER, "A": _FULL_LAYER}
    gated_delta_net: ClassVar[tuple[Mapped, ...]] = _GATED_DELTA_NET
    """Fields of config.json with sizes and options of Gated DeltaNet."""

    def unsupported_reason(self, model: ModelConfig) -> str | None:
        """Return why this architecture cannot compute a model, or None if it can."""
        kinds, where = set(model.layers), f"model.layer_pattern = {model.layer_pattern}"
        if "G" not in kinds:
            return f"{where} has no Gated DeltaNet layer, and this class needs one"
        if "A" not in kinds:
            return f"{where} has no full attention layer, and this class needs one"
        if not kinds <= {"G", "A"}:
            return f"{where} mixes Gated DeltaNet with sliding windows, and this class has none"
        gdn = sizes(model)
        if gdn.norm_eps != OUTPUT_NORM_EPS:
            return f"model.gdn.norm_eps = {gdn.norm_eps}, and this class has {OUTPUT_NORM_EPS} fixed"
        return None

    def default_layer_types(self, count: int) -> list[str]:
        """Return full attention in every fourth layer, or in the last of fewer than four."""
        types = [FULL if index % 4 == 3 else LINEAR for index in range(count)]
        return types if FULL in types else [*types[:-1], FULL]

    def read_layer_types(self, fields: Fields, count: int) -> Any:
        """Return the type of each layer. Older files list the full attention layers in `fla_hybrid_attention_indices`."""
        indices = fields.config.get(_INDICES)
        stated = fields.config.get("layer_types")
        if stated is None and isinstance(indices, list) and all(type(index) is int for index in indices):
            full = set(indices)
            return [FULL if index in full else LINEAR for index in range(count)]
        types = super().read_layer_types(fields, count)
        full_layers = [index for index, name in enumerate(types) if name == FULL] if isinstance(types, list) else []
        if indices is not None and indices != full_layers:
            fields.problems.append(f"{_INDICES} does not say the same as layer_types")
        return types

    def read(self, fields: Fields, layer_types: Sequence[str]) -> dict[str, Any]:
        """Return the section of the Gated DeltaNet layers."""
        if LINEAR not in layer_types:
            return {}
        section = {entry.ours: entry.read(fields) for entry in (*self.gated_delta_net, _FLOOR)}
        section |= {low.ours: [low.read(fields), high.read(fields)] for low, high in _RANGES}
        return {"gdn": section | {"norm_eps": OUTPUT_NORM_EPS}}

    def write(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the fields of the Gated DeltaNet layers."""
        gdn = sizes(model)
        fields = {entry.theirs: getattr(gdn, entry.ours) for entry in self.gated_delta_net}
        for low, high in _RANGES:
            fields[low.theirs], fields[high.theirs] = getattr(gdn, low.ours)
        return fields | {_FLOOR.theirs: gdn.dt_init_floor}

    def card_rows(self, model: ModelConfig) -> dict[str, str]:
        """Return the heads of the Gated DeltaNet layers."""
        gdn = sizes(model)
        keys = f"{gdn.num_key_heads} key heads of {gdn.key_head_dim}"
        return {"Gated DeltaNet": f"{keys}, {gdn.num_value_heads} value heads of {gdn.value_head_dim}"}
