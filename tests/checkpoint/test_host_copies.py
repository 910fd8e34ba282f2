"""Copies for background saves: what is written is the state at the save, and memory is used again."""

import pytest
import torch

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.checkpoint.host_copies import HostCopies
from megatron_hybrid.checkpoint.writer import SlicedTensor


def shards(*data):
    return (SlicedTensor(f"w{n}", tuple(x.shape), TensorSlice.whole(tuple(x.shape)), x) for n, x in enumerate(data))


def test_a_later_step_changes_no_copy():
    weight = torch.arange(6.0).view(2, 3).requires_grad_()
    (copy,) = HostCopies().of(shards(weight))
    with torch.no_grad():
        weight.zero_()
    assert copy.data.tolist() == [[0, 1, 2], [3, 4, 5]] and not copy.data.requires_grad


def test_memory_is_used_again():
    copies, data = HostCopies(), (torch.ones(4), torch.ones(2, 3, dtype=torch.bfloat16).t())
    first = [copy.data for copy in copies.of(shards(*data))]
    again = [copy.data for copy in copies.of(shards(*(2 * x for x in data)))]
    assert [x.data_ptr() for x in first] == [x.data_ptr() for x in again]
    assert all(torch.equal(found, 2 * x) and found.is_contiguous() for found, x in zip(again, data, strict=True))


@pytest.mark.parametrize("second", [(torch.ones(5),), (torch.ones(4).double(), torch.ones(1)), ()])
def test_other_tensors_than_at_the_save_before(second):
    copies = HostCopies()
    copies.of(shards(torch.zeros(4), torch.zeros(4)))
    found = [copy.data for copy in copies.of(shards(*second))]
    assert [(x.dtype, x.tolist()) for x in found] == [(x.dtype, x.tolist()) for x in second]
