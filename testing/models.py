"""Models that tests share. Fields of ModelConfig; nothing is imported here."""


def hybrid(
    layer_pattern: str,
    hidden_size: int,
    heads: int,
    key_head_dim: int,
    *,
    key_heads: int | None = None,
    value_head_dim: int | None = None,
    **more,
) -> dict:
    """A model with as many heads of attention as of Gated DeltaNet, values twice as wide as keys; `more`: other fields."""
    gdn = dict(
        num_key_heads=key_heads or heads,
        num_value_heads=heads,
        key_head_dim=key_head_dim,
        value_head_dim=value_head_dim or 2 * key_head_dim,
    )
    model = dict(layer_pattern=layer_pattern, hidden_size=hidden_size, num_attention_heads=heads, gdn=gdn)
    return model | dict(ffn_hidden_size=2 * hidden_size, vocab_size=131) | more


def qwen(layer_pattern: str, hidden_size: int, heads: int, groups: int, head_dim: int, key_heads: int, **more) -> dict:
    """A model of Qwen3.5's blocks, with twice as many heads of values as of keys in Gated DeltaNet; `more`: other fields."""
    attention = dict(norm="pre", qk_norm="per_head", output_gate=True, partial_rotary_factor=0.25)
    gdn = dict(num_key_heads=key_heads, num_value_heads=2 * key_heads, key_head_dim=8, value_head_dim=8)
    gdn |= dict(allow_negative_eigenvalues=False, norm_eps=1e-6)
    model = dict(layer_pattern=layer_pattern, hidden_size=hidden_size, num_attention_heads=heads, gdn=gdn)
    model |= dict(num_key_value_heads=groups, head_dim=head_dim, blocks={"A": attention}, rope_theta=1e7)
    return (
        model
        | dict(zero_centered_norm=True, ffn_hidden_size=2 * hidden_size, vocab_size=131, tie_embeddings=True)
        | more
    )


def small(layer_pattern: str, hidden_size: int, heads: int, groups: int, head_dim: int, **more) -> dict:
    """A model of the blocks of AI2's small hybrid suite; `more`: other fields."""
    gdn = dict(num_key_heads=heads, num_value_heads=heads, key_head_dim=head_dim, value_head_dim=2 * head_dim)
    attention = dict(norm="peri", qk_norm="per_head", output_gate=True)
    model = dict(layer_pattern=layer_pattern, hidden_size=hidden_size, num_attention_heads=heads, gdn=gdn)
    model |= dict(num_key_value_heads=groups, head_dim=head_dim, blocks={"G": dict(norm="peri"), "A": attention})
    model |= dict(rope_theta=None, embed_scale=hidden_size**0.5, embedding_norm=True)
    return model | dict(ffn_hidden_size=2 * hidden_size, vocab_size=131) | more


SMALL = hybrid("GGA", 64, 4, 16, vocab_size=257)
"""A model of both kinds of layers, for tests that need any."""

SMALLEST = hybrid("GA", 32, 2, 8, vocab_size=97)
"""Two layers, for whole runs in processes of their own."""
