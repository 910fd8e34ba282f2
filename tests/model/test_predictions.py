"""Correct predictions against the argmax of all logits, whole and with a vocabulary that is shared by ranks."""

from unittest.mock import patch

import pytest
import torch

from hybrid_kernels.collectives import VocabParallel
from megatron_hybrid.model import predictions
from megatron_hybrid.model.predictions import count_correct
from testing.thread_ranks import ThreadRanks

TRUE_SIZE, PADDED, HIDDEN = 53, 64, 8


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Hidden states, weights with equal rows and large padding, labels, masks, and the expected count."""
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-3, 4, shape, generator=random).float() for shape in ((31, 3, HIDDEN), (PADDED, HIDDEN)))
    weight[7] *= 2
    weight[40] = weight[7]  # on another rank: the lower id counts
    weight[TRUE_SIZE:] = 100.0
    logits = x @ weight[:TRUE_SIZE].t()
    labels = torch.where(torch.rand(31, 3, generator=random) < 0.6, logits.argmax(-1), torch.tensor(40))
    mask = (torch.rand(31, 3, generator=random) < 0.7).float() * 0.5
    assert (logits.argmax(-1) == 7).any() and not (logits.argmax(-1) == 40).any()
    return x, weight, labels, mask, int(((logits.argmax(-1) == labels) & (mask > 0)).sum())


@pytest.mark.parametrize("blocks", [(1024, 16384), (5, 7)])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_counts_are_those_of_argmax(size, blocks):
    x, weight, labels, mask, expected = case()
    group = ThreadRanks(size)

    def vocabulary(rank: int) -> VocabParallel:
        def reduce_max(values: torch.Tensor) -> None:
            values.copy_(group.gather(values.clone()).amax(0))

        return VocabParallel(rank, size, reduce_max, reduce_max, reduce_max)

    def count(rank: int) -> int:
        rows = weight.chunk(size)[rank]
        return int(count_correct(x, rows, labels, mask, TRUE_SIZE, vocabulary(rank) if size > 1 else None))

    with patch.multiple(predictions, _TOKENS=blocks[0], _ROWS=blocks[1]):
        assert group.run(count) == [expected] * size and 0 < expected < int((mask > 0).sum())
