"""Models that tests share where any will do. Fields of ModelConfig; nothing is imported here."""

SMALL = dict(
    layer_pattern="GGA",
    hidden_size=64,
    ffn_hidden_size=128,
    vocab_size=257,
    num_attention_heads=4,
    gdn=dict(num_key_heads=4, num_value_heads=4, key_head_dim=16, value_head_dim=32),
)
"""A model of both kinds of layers, for tests that need any."""

SMALLEST = dict(
    layer_pattern="GA",
    hidden_size=32,
    ffn_hidden_size=64,
    vocab_size=97,
    num_attention_heads=2,
    gdn=dict(num_key_heads=2, num_value_heads=2, key_head_dim=8, value_head_dim=16),
)
"""Two layers, for whole runs in processes of their own."""
