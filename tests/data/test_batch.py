"""The micro-batch type."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.sample import Sample, SampleCounts, starts_of

SAMPLES = torch.arange(2 * 9).view(2, 9)


def test_labels_are_the_next_tokens():
    batch = Batch.of_samples(SAMPLES)
    assert batch.tokens.tolist() == SAMPLES[:, :8].tolist() and batch.labels.tolist() == SAMPLES[:, 1:].tolist()
    assert batch.loss_mask.dtype == torch.float32 and (batch.loss_mask == 1).all() and batch.documents is None


@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_put_together_are_the_batch(size):
    batch = Batch.of_samples(SAMPLES)
    slices = [batch.slice(rank, size).tensors() for rank in range(size)]
    for name, whole in batch.tensors().items():
        assert torch.equal(torch.cat([part[name] for part in slices], 1), whole), name


def test_what_cannot_be_sliced_is_refused():
    batch = Batch.of_samples(SAMPLES)
    with pytest.raises(ValueError, match="8 tokens do not divide into 3 slices"):
        batch.slice(0, 3)


def sample(tokens: list[int], firsts: list[int], counted: int) -> Sample:
    """A sample of three tokens whose documents begin at `firsts`."""
    mask = np.array([1, 0, 1], np.float32)
    starts = starts_of(np.array(firsts, np.int64), 3)
    return Sample(np.array(tokens), np.array(tokens) + 1, mask, starts, SampleCounts(3, counted, 3 - counted))


def test_samples_with_documents():
    batch = Batch.collate([sample([1, 2, 3], [1], 2), sample([4, 5, 6], [1, 2], 1)])
    assert batch.tokens.tolist() == [[1, 2, 3], [4, 5, 6]] and batch.labels.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert batch.loss_mask.tolist() == [[1, 0, 1]] * 2 and batch.counts == SampleCounts(6, 3, 3)
    assert batch.documents.tolist() == [[0, 1, 1], [0, 1, 2]] and batch.documents.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 4, 5] + [6] * 12 and batch.cu_seqlens.dtype == torch.int32
    assert {x.device.type for x in batch.to(torch.device("meta")).tensors().values()} == {"meta"}


def test_a_slice_keeps_the_documents_of_whole_sequences():
    batch = Batch.collate([sample([1, 2, 3], [1], 2)])
    part = batch.slice(1, 3)
    assert part.tokens.tolist() == [[2]] and part.labels.tolist() == [[3]] and part.loss_mask.tolist() == [[0]]
    assert part.documents is batch.documents and part.cu_seqlens is batch.cu_seqlens and part.counts is batch.counts


def test_a_mask_without_documents():
    without = replace(sample([1, 2, 3], [], 2), starts=None)
    batch = Batch.collate([without, without])
    assert batch.documents is None and batch.cu_seqlens is None and batch.loss_mask.tolist() == [[1, 0, 1]] * 2


def test_every_tensor_moves():
    moved = Batch.of_samples(SAMPLES).to(torch.device("meta"))
    assert {x.device.type for x in moved.tensors().values()} == {"meta"}
