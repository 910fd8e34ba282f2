"""OLMo 3: post-norm attention layers, most of them with a sliding window (`Olmo3ForCausalLM`)."""

from collections.abc import Sequence
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.convert.hf.base import Architecture
from megatron_hybrid.convert.hf.fields import Fields, FieldTable
from megatron_hybrid.convert.hf.names import LayerNames, each
from megatron_hybrid.convert.hf.rope import RopeForms

SLIDING, FULL = "sliding_attention", "full_attention"
_LAYER = LayerNames(
    {
        **each("qkvo", "attention.{}_proj.weight", "self_attn.{}_proj.weight"),
        **each("qk", "attention.{}_norm.weight", "self_attn.{}_norm.weight"),
        **each(("gate", "up", "down"), "mlp.{}_proj.weight", "mlp.{}_proj.weight"),
        "mixer_norm.weight": "post_attention_layernorm.weight",
        "mlp_norm.weight": "post_feedforward_layernorm.weight",
    }
)


class Olmo3(Architecture):
    """`Olmo3ForCausalLM` of transformers."""

    model_type = "olmo3"
    class_name = "Olmo3ForCausalLM"
    layer_types = {SLIDING: "W", FULL: "A"}
    old_layer_types = {"attention": FULL}
    fields = FieldTable(
        converted={"sliding_window": "sliding_window"},
        defaults={
            "vocab_size": 50304, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False,
            "sliding_window": 4096, "max_position_embeddings": 2048, "eos_token_id": 50279, "pad_token_id": 1,
        },
    )  # fmt: skip
    rope = RopeForms(optional=False, per_layer_type=True)
    layers = {"W": _LAYER, "A": _LAYER}

    def unsupported_reason(self, model: ModelConfig) -> str | None:
        """Return why this architecture cannot compute a model, or None if it can."""
        if not set(model.layers) <= {"W", "A"}:
            return f"model.layer_pattern = {model.layer_pattern} has layers that are not attention"
        if model.rope_theta is None:
            return "model.rope_theta is null, and this class always has rotary embedding"
        return None

    def default_layer_types(self, count: int) -> list[str]:
        """Return full attention in every fourth layer."""
        return [FULL if index % 4 == 3 else SLIDING for index in range(count)]

    def read(self, fields: Fields, layer_types: Sequence[str]) -> dict[str, Any]:
        """Return the width of the sliding window."""
        return {"sliding_window": fields.get("sliding_window", int, ...)} if SLIDING in layer_types else {}

    def write(self, model: ModelConfig, positions: int) -> dict[str, Any]:
        """Return the width of the sliding window.

        transformers builds the mask of sliding layers for models without such layers, too. Some readers apply the window to
        all layers. The window of such a model is therefore as long as its longest sequence.
        """
        return {"sliding_window": model.sliding_window if "W" in model.layers else positions}

    def export_notes(self, model: ModelConfig) -> list[str]:
        """Return a note about scaled rotary embedding."""
        if model.rope_scaling is None or not {"A", "W"} <= set(model.layers):
            return []
        return ["transformers 5.0 to 5.12 apply rope_scaling to sliding attention as well; use 4.57, or 5.13 and later"]
