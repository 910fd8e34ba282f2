"""Padded sizes and what each rank truly holds of them."""

import pytest

from megatron_hybrid.arch.padding import PaddedSizes, round_up, true_part
from megatron_hybrid.config.presets import olmo_hybrid_7b


@pytest.mark.parametrize(("tp", "heads"), [(1, 30), (2, 30), (4, 32), (8, 32)])
def test_the_7b_under_every_degree(tp, heads):
    sizes = PaddedSizes.of(olmo_hybrid_7b(), tp)
    assert sizes.num_attention_heads == sizes.gdn_key_heads == sizes.gdn_value_heads == heads
    assert sizes.vocab_size == 100352


def test_groups_stay_whole():
    model = olmo_hybrid_7b().model_copy(update={"num_key_value_heads": 6})
    sizes = PaddedSizes.of(model, 4)
    assert (sizes.num_key_value_heads, sizes.num_attention_heads) == (8, 40)


@pytest.mark.parametrize(("true", "ranks"), [(30, 4), (30, 8), (6, 4), (3, 4), (257, 2), (8, 8)])
def test_parts_tile_the_true_size(true, ranks):
    padded = round_up(true, ranks)
    parts = [true_part(true, padded, rank, ranks) for rank in range(ranks)]
    at = 0
    for start, length in parts:
        assert length == 0 or start == at
        at += length
    assert at == true
