"""Presets of AI2's small hybrid suite: four Gated DeltaNet layers, then gated attention without rotary embedding, all peri-norm.

Source: `src/scripts/train/hybrid-small-suite/arch.py` of allenai/OLMo-core, branch yashasbls/hybrid-small-suite, commit f55a7edc6. Its
comments give the numbers of parameters: 275,493,760, 810,354,816 and 1,422,110,720. The vocabulary is that of the dolma2
tokenizer, padded to a multiple of 128. The MLP is eight times as wide as the model.
"""

import math
from collections.abc import Callable, Mapping

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.model import ModelConfig

HEAD_DIM, KEY_VALUE_HEADS = 128, 8


BLOCKS = {
    "G": Block(mixer="gated_delta_net", title="Gated DeltaNet", norm="peri", output_gate=True),
    "A": Block(mixer="attention", title="gated attention", norm="peri", qk_norm="per_head", output_gate=True),
}


def _small(layers: int, hidden_size: int, heads: int) -> ModelConfig:
    return ModelConfig(
        layer_pattern=f"GGGGA*{layers // 5}",
        blocks=BLOCKS,
        hidden_size=hidden_size,
        ffn_hidden_size=8 * hidden_size,
        vocab_size=100352,
        num_attention_heads=heads,
        num_key_value_heads=KEY_VALUE_HEADS if heads != KEY_VALUE_HEADS else None,
        head_dim=HEAD_DIM,
        gdn=dict(num_key_heads=heads, num_value_heads=heads, key_head_dim=HEAD_DIM, value_head_dim=2 * HEAD_DIM),
        rope_theta=None,
        embed_scale=math.sqrt(hidden_size),
        embedding_norm=True,
        eos_token_id=100257,
        pad_token_id=100277,
    )


def olmo_hybrid_small_275m() -> ModelConfig:
    """Return the 275M model."""
    return _small(10, 640, heads=8)


def olmo_hybrid_small_810m() -> ModelConfig:
    """Return the 810M model."""
    return _small(15, 1024, heads=16)


def olmo_hybrid_small_1_4b() -> ModelConfig:
    """Return the 1.4B model."""
    return _small(20, 1280, heads=16)


SMALL: Mapping[str, Callable[[], ModelConfig]] = {
    "olmo_hybrid_small_275m": olmo_hybrid_small_275m,
    "olmo_hybrid_small_810m": olmo_hybrid_small_810m,
    "olmo_hybrid_small_1.4b": olmo_hybrid_small_1_4b,
}
