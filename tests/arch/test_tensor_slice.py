"""TensorSlice against plain indexing."""

from itertools import product

import pytest
import torch

from megatron_hybrid.arch.tensor_slice import TensorSlice

SHAPE = (3, 4)
TENSOR = torch.arange(12).view(SHAPE)
SLICES = [
    TensorSlice((r, c), (n, m))
    for r, c in product(range(3), range(4))
    for n in range(1, 4 - r)
    for m in range(1, 5 - c)
]


def elements(part: TensorSlice) -> set[int]:
    return set(TENSOR[part.index].flatten().tolist())


@pytest.mark.parametrize("part", SLICES, ids=str)
def test_narrow_and_index_select_the_same_elements(part):
    assert torch.equal(part.narrow(TENSOR), TENSOR[part.index])
    assert part.numel == part.narrow(TENSOR).numel() == len(elements(part))


def test_intersection_is_that_of_the_elements():
    for a, b in product(SLICES, SLICES):
        shared = a.intersection(b)
        assert (elements(shared) if shared else set()) == elements(a) & elements(b)


def test_relative_to_selects_the_same_elements_of_the_part():
    outer = TensorSlice((1, 1), (2, 3))
    for part in SLICES:
        if (shared := part.intersection(outer)) is not None:
            inner = shared.relative_to(outer.offset)
            assert torch.equal(outer.narrow(TENSOR)[inner.index], TENSOR[shared.index])


def test_a_scalar_has_one_element():
    assert TensorSlice.whole(()).numel == 1 and TensorSlice.whole(()).index == ()


def test_slices_of_different_rank_are_an_error():
    with pytest.raises(ValueError):
        TensorSlice((0,), (1, 2)).index  # noqa: B018 - it raises
