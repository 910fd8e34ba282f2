"""Presets of Qwen3.5's dense language models (transformers' `qwen3_5_text`): three Gated DeltaNet layers, then gated attention.

Sources of the sizes: published config.json files for 0.8B and 27B, model cards for 2B and 4B, transformers' defaults for 9B.
"""

from collections.abc import Callable, Mapping

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.model import ModelConfig

VOCABULARY, END_OF_TEXT = 248_320, 248_044
ROPE_THETA = 10_000_000.0


def _qwen(
    layers: int, hidden_size: int, ffn_hidden_size: int, heads: int, groups: int, value_heads: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        layer_pattern=f"GGGA*{layers // 4}",
        blocks={
            "A": Block(
                mixer="attention",
                title="gated attention",
                norm="pre",
                qk_norm="per_head",
                output_gate=True,
                partial_rotary_factor=0.25,
            )
        },
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        vocab_size=VOCABULARY,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=256,
        gdn=dict(
            num_key_heads=16,
            num_value_heads=value_heads,
            key_head_dim=128,
            value_head_dim=128,
            allow_negative_eigenvalues=False,
            norm_eps=1e-6,
        ),
        rope_theta=ROPE_THETA,
        zero_centered_norm=True,
        tie_embeddings=tied,
        eos_token_id=END_OF_TEXT,
    )


def qwen3_5_0_8b() -> ModelConfig:
    """Return Qwen3.5 0.8B."""
    return _qwen(24, 1024, 3584, heads=8, groups=2, value_heads=16, tied=True)


def qwen3_5_2b() -> ModelConfig:
    """Return Qwen3.5 2B."""
    return _qwen(24, 2048, 6144, heads=8, groups=2, value_heads=16, tied=True)


def qwen3_5_4b() -> ModelConfig:
    """Return Qwen3.5 4B."""
    return _qwen(32, 2560, 9216, heads=16, groups=4, value_heads=32, tied=True)


def qwen3_5_9b() -> ModelConfig:
    """Return Qwen3.5 9B, the sizes that transformers takes for absent fields of config.json."""
    return _qwen(32, 4096, 12288, heads=16, groups=4, value_heads=32, tied=False)


def qwen3_5_27b() -> ModelConfig:
    """Return Qwen3.5 27B."""
    return _qwen(64, 5120, 17408, heads=24, groups=4, value_heads=48, tied=False)


QWEN: Mapping[str, Callable[[], ModelConfig]] = {
    "qwen3_5_0.8b": qwen3_5_0_8b,
    "qwen3_5_2b": qwen3_5_2b,
    "qwen3_5_4b": qwen3_5_4b,
    "qwen3_5_9b": qwen3_5_9b,
    "qwen3_5_27b": qwen3_5_27b,
}
