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


SMALL = hybrid("GGA", 64, 4, 16, vocab_size=257)
"""A model of both kinds of layers, for tests that need any."""

SMALLEST = hybrid("GA", 32, 2, 8, vocab_size=97)
"""Two layers, for whole runs in processes of their own."""
