"""Logits from chunked prefill and decoding against transformers' full forward, at every position of unequal sequences."""

import pytest

from testing.models import SMALL, hybrid, qwen, small
from tests.model import incremental_jobs

LENGTHS = [150, 1, 65, 128]
WINDOWED = dict(
    layer_pattern="WWAW", hidden_size=64, ffn_hidden_size=96, vocab_size=131, num_attention_heads=4, num_key_value_heads=2,
    sliding_window=24,
)  # fmt: skip
SCALED = WINDOWED | dict(rope_scaling=dict(factor=4.0, original_max_position_embeddings=64))
QWEN = qwen("GAG", 48, 6, 3, 16, 3)
PERI_NORM = small("GAG", 48, 6, 3, 16)
GROUPED = hybrid("GAG", 48, 4, 8, key_heads=2, rope_theta=None, tie_embeddings=True, num_key_value_heads=2)


@pytest.mark.parametrize(
    ("model", "chunk", "ranks_of_tensor"),
    [
        (SMALL, 64, 1),
        (SMALL, 72, 2),
        (GROUPED, 200, 1),
        (WINDOWED, 16, 1),
        (WINDOWED, 64, 2),
        (SCALED, 200, 1),
        (QWEN, 72, 2),
        (PERI_NORM, 72, 2),
    ],
)
def test_every_position_agrees_with_the_full_forward(ranks, model, chunk, ranks_of_tensor):
    arguments = dict(model=model, lengths=LENGTHS, chunk=chunk, steps=40, tensor_parallel_size=ranks_of_tensor)
    for errors in ranks.run(incremental_jobs.errors_of_logits, ranks_of_tensor, **arguments):
        assert max(errors) < 1e-5, errors
