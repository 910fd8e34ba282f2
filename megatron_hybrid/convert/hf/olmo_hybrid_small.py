"""AI2's small hybrid suite: peri-norm layers of Gated DeltaNet and of gated attention without rotary embedding.

`MainlineLadderForCausalLM` is not in transformers: AI2's checkpoints bring its code with them (`auto_map`). Source: the modular
file of AI2's transformers plug-in, which derives it from `OlmoHybridForCausalLM`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_hybrid.arch.blocks import Blocks
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config.small_presets import BLOCKS
from megatron_hybrid.convert.hf.fields import Fields, FieldTable, Mapped
from megatron_hybrid.convert.hf.names import LayerNames, each
from megatron_hybrid.convert.hf.olmo_hybrid import FULL, LINEAR, OlmoHybrid
from megatron_hybrid.convert.hf.rope import RopeForms

_SCALE, _EPS = "embed_scale", "embedding_norm_eps"
_OLMO = OlmoHybrid.fields
_NORMS = {
    "mixer_norm.weight": "input_layernorm.weight",
    "post_mixer_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.weight": "ffn_layernorm.weight",
    "post_mlp_norm.weight": "post_feedforward_layernorm.weight",
}
_LINEAR_LAYER = replace(OlmoHybrid.layers["G"], names={**OlmoHybrid.layers["G"].names, **_NORMS}, spellings={})
_FULL_LAYER = LayerNames(
    {
        **OlmoHybrid.layers["A"].names,
        **each(("gate",), "attention.{}_proj.weight", "self_attn.attn_{}.weight"),
        **_NORMS,
    }
)


def _heads(fields: Fields) -> Any:
    return fields.get("num_attention_heads", int)


def _head_dim(fields: Fields) -> Any:
    return fields.get("head_dim", int)


def _value_head_dim(fields: Fields) -> int | None:
    key = fields.get("linear_key_head_dim", int, _head_dim(fields))
    return 2 * key if key else None


class OlmoHybridSmall(OlmoHybrid):
    """`MainlineLadderForCausalLM` of AI2's transformers plug-in."""

    model_type = "mainline_ladder"
    class_name = "MainlineLadderForCausalLM"
    fields = FieldTable(
        converted={**_OLMO.converted, _SCALE: "embed_scale", _EPS: "norm_eps"},
        required={**_OLMO.required, "use_attention_gate": (True,), "use_head_qk_norm": (True,)},
        ignored=_OLMO.ignored,
        defaults={
            **_OLMO.defaults, "hidden_size": 640, "intermediate_size": 5120, "num_hidden_layers": 10, "num_attention_heads": 8,
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 8192,
        },
    )  # fmt: skip
    vllm_flags = ""
    rope = RopeForms(optional=True, per_layer_type=False, never=True)
    layers = {"G": _LINEAR_LAYER, "A": _FULL_LAYER}
    embedding_norm = True
    gated_delta_net = (
        Mapped("linear_num_key_heads", "num_key_heads", int, _heads),
        Mapped("linear_num_value_heads", "num_value_heads", int, _heads),
        Mapped("linear_key_head_dim", "key_head_dim", int, _head_dim),
        Mapped("linear_value_head_dim", "value_head_dim", int, _value_head_dim),
        Mapped("linear_conv_kernel_dim", "conv_kernel_size", int, 4),
        Mapped("linear_allow_neg_eigval", "allow_negative_eigenvalues", bool, True),
    )

    def blocks(self, model: ModelConfig) -> Blocks:
        """Return its blocks, which are peri-norm."""
        return BLOCKS

    def unsupported_reason(self, model: ModelConfig) -> str | None:
        """Return why this architecture cannot compute a model, or None if it can."""
        if model.rope_theta is not None:
            return f"model.rope_theta is {model.rope_theta:g}, and this class has no rotary embedding"
        return super().unsupported_reason(model)

    def default_layer_types(self, count: int) -> list[str]:
        """Return full attention in every fifth layer, or in the last of fewer than five."""
        types = [FULL if index % 5 == 4 else LINEAR for index in range(count)]
        return types if FULL in types else [*types[:-1], FULL]

    def read(self, fields: Fields, layer_types: Sequence[str]) -> dict[str, Any]:
        """Return the blocks, the section of the Gated DeltaNet layers, and the scale and norm of the embeddings."""
        eps, norm_eps = fields.number(_EPS, 1e-6), fields.number("rms_norm_eps")
        if eps != norm_eps:
            fields.problems.append(f"{_EPS} = {eps} cannot be represented; only rms_norm_eps = {norm_eps} can")
        width = fields.get("hidden_size", int)
        scale = fields.number(_SCALE, width**0.5 if width and 0 < width < 1 << 31 else None)
        blocks = {symbol: block.model_dump() for symbol, block in BLOCKS.items()}
        embedding = {"embed_scale": scale, "embedding_norm": True}
        return {"blocks": blocks, **embedding, **super().read(fields, layer_types)}

    def write(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the fields of the Gated DeltaNet layers, attention and embeddings."""
        own = {_SCALE: model.embed_scale, _EPS: model.norm_eps, "head_dim": model.attention_head_dim}
        return {**super().write(model, positions), **own, "use_attention_gate": True, "use_head_qk_norm": True}

    def card_rows(self, model: ModelConfig) -> dict[str, str]:
        """Return the heads of the Gated DeltaNet layers, and the embedding."""
        return {**super().card_rows(model), "embedding": f"times {model.embed_scale:g}, normalised"}

    def export_notes(self, model: ModelConfig) -> list[str]:
        """Return a note about the class, which transformers lacks."""
        return [
            f"transformers has no {self.class_name}; add AI2's modelling code and auto_map to the folder, and load it with "
            "trust_remote_code"
        ]
