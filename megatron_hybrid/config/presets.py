"""Model presets. A run selects one by `model: olmo_hybrid_7b`, or `model: {base_preset: olmo_hybrid_7b, layer_pattern: GGGA*4}`."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError, shown
from megatron_hybrid.config.qwen_presets import QWEN
from megatron_hybrid.config.small_presets import SMALL

ArchitectureOf = Callable[[str], dict[str, Any]]
"""Returns the fields of the model in a folder (convert/architecture.py)."""


def olmo_hybrid_7b() -> ModelConfig:
    """Return AI2's OLMo Hybrid 7B: one attention layer after three Gated DeltaNet layers, 7,430,870,688 parameters."""
    return ModelConfig(
        layer_pattern="GGGA*8",
        hidden_size=3840,
        ffn_hidden_size=11008,
        vocab_size=100352,
        num_attention_heads=30,
        gdn=dict(num_key_heads=30, num_value_heads=30, key_head_dim=96, value_head_dim=192),
        rope_theta=500_000.0,
        eos_token_id=100257,
        pad_token_id=100277,
    )


def olmo_hybrid_tiny() -> ModelConfig:
    """Return a small OLMo Hybrid that trains on four CPU ranks at TP2 x PP2. Its vocabulary is 256 bytes and end-of-document."""
    return ModelConfig(
        layer_pattern="GGGA*2",
        hidden_size=128,
        ffn_hidden_size=384,
        vocab_size=257,
        num_attention_heads=4,
        gdn=dict(num_key_heads=4, num_value_heads=4, key_head_dim=24, value_head_dim=48),
        rope_theta=500_000.0,
        eos_token_id=256,
    )


def olmo3_7b() -> ModelConfig:
    """Return AI2's OLMo 3 7B, the transformer baseline of OLMo Hybrid: three of four layers have a window of 4096 tokens.

    Like OLMo Hybrid's, its vocabulary includes the padding that it was trained with.
    """
    return ModelConfig(
        layer_pattern="WWWA*8",
        hidden_size=4096,
        ffn_hidden_size=11008,
        vocab_size=100352,
        num_attention_heads=32,
        rope_theta=500_000.0,
        sliding_window=4096,
        eos_token_id=100257,
        pad_token_id=100277,
    )


def pure_gdn(of: str) -> ModelConfig:
    """Return a model of Gated DeltaNet layers with the hidden size, MLP, depth, vocabulary and heads of preset `of`.

    If `of` has no Gated DeltaNet, the mixer gets as many heads as its attention, in OLMo Hybrid's proportions: all keys together are
    three quarters of the hidden size, and values are twice as wide as keys.

    Raises:
        ConfigError: `of` is not a preset with a size.
    """
    base = _sized(of)
    heads = base.num_attention_heads
    key_head_dim = 3 * base.hidden_size // (4 * heads)
    gdn = base.section("gdn") or dict(
        num_key_heads=heads, num_value_heads=heads, key_head_dim=key_head_dim, value_head_dim=2 * key_head_dim
    )
    return _changed(base, layer_pattern=f"G*{base.num_layers}", gdn=gdn, sliding_window=None)


def pure_attention(of: str) -> ModelConfig:
    """Return a model of full attention layers with the hidden size, MLP, depth, vocabulary and heads of preset `of`.

    Raises:
        ConfigError: `of` is not a preset with a size.
    """
    base = _sized(of)
    return _changed(base, layer_pattern=f"A*{base.num_layers}", gdn=None, sliding_window=None)


SIZED: Mapping[str, Callable[[], ModelConfig]] = {
    "olmo_hybrid_7b": olmo_hybrid_7b,
    "olmo_hybrid_tiny": olmo_hybrid_tiny,
    "olmo3_7b": olmo3_7b,
    **SMALL,
    **QWEN,
}
"""Presets with a size."""

UNSIZED: Mapping[str, Callable[[str], ModelConfig]] = {"pure_gdn": pure_gdn, "pure_attention": pure_attention}
"""Presets that take the size of another preset: `{base_preset: pure_gdn, of: olmo_hybrid_7b}`."""


def _changed(base: ModelConfig, **fields: object) -> ModelConfig:
    return ModelConfig.model_validate({**base.model_dump(), **fields})


def _sized(name: object) -> ModelConfig:
    if isinstance(name, str) and name in SIZED:
        return SIZED[name]()
    best = nearest.word(shown(name), SIZED)
    raise ConfigError.at(
        "model.of",
        f"{shown(name)} is not a preset with a size; the nearest of {', '.join(SIZED)} is {best}",
    )


def preset(name: str, of: str | None = None) -> ModelConfig:
    """Return the preset called `name`.

    Args:
        of: preset whose size `pure_gdn` and `pure_attention` take.

    Raises:
        ConfigError: no such preset, or `of` is missing, wrong or not needed.
    """
    if isinstance(name, str) and name in UNSIZED:
        if of is None:
            example = f"{{base_preset: {name}, of: olmo_hybrid_7b}}"
            raise ConfigError.at(
                "model.of",
                f"is missing; name the preset whose size {name} takes: {example}",
            )
        return UNSIZED[name](of)
    if not isinstance(name, str) or name not in SIZED:
        names = [*SIZED, *UNSIZED]
        best = nearest.word(shown(name), names)
        raise ConfigError.at(
            "model.base_preset",
            f"{shown(name)} is not one of {', '.join(names)}; the nearest is {best}",
        )
    if of is not None:
        raise ConfigError.at(
            "model.of",
            f"{shown(of)} is for {' and '.join(UNSIZED)}, and {name} has its own size; remove it",
        )
    return SIZED[name]()


def expand(model: object, architecture_of: ArchitectureOf | None = None) -> object:
    """Replace the preset or trained model that a `model` section names by its fields, overridden by the section's other fields.

    Nested sections (`gdn`) are overridden field by field. A model that names neither is returned unchanged.

    Args:
        architecture_of: reads the fields of `from`; None: this command does not read it.

    Raises:
        ConfigError: as `preset` and `architecture_of`.
    """
    if isinstance(model, str):
        model = {"base_preset": model}
    if isinstance(model, dict) and "from" in model:
        return _trained(model, architecture_of)
    if not isinstance(model, dict) or not {"base_preset", "of"} & set(model):
        return model
    if "base_preset" not in model:
        raise ConfigError.at(
            "model.of",
            "needs a preset whose size to take; write {base_preset: pure_gdn, of: ...}, or remove it",
        )
    changes = {key: value for key, value in model.items() if key not in ("base_preset", "of")}
    return _overlay(preset(model["base_preset"], model.get("of")).model_dump(mode="json"), changes)


def _trained(model: dict[str, Any], architecture_of: ArchitectureOf | None) -> dict[str, Any]:
    path = model["from"]
    if {"base_preset", "of"} & set(model):
        raise ConfigError.at("model.from", "excludes base_preset and of; remove it or them")
    if not isinstance(path, str) or not path:
        raise ConfigError.at(
            "model.from", f"{shown(path)} is not the path of a run, a checkpoint or a Hugging Face folder"
        )
    if architecture_of is None:
        raise ConfigError.at(
            "model.from",
            "is not read by this command; write the model's fields, as megatron-hybrid pretrain --dry-run prints them",
        )
    return _overlay(architecture_of(path), {key: value for key, value in model.items() if key != "from"})


def _overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _overlay(base[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **changes, **both}
