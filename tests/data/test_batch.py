"""The micro-batch type."""

import pytest
import torch

from megatron_hybrid.data.batch import Batch

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
    documents = Batch(batch.tokens, batch.labels, batch.loss_mask, documents=torch.tensor([0, 3]))
    assert documents.slice(0, 1) is documents
    with pytest.raises(NotImplementedError, match="document boundaries"):
        documents.slice(0, 2)


def test_every_tensor_moves():
    moved = Batch.of_samples(SAMPLES).to(torch.device("meta"))
    assert {x.device.type for x in moved.tensors().values()} == {"meta"}
