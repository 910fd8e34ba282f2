"""Best-fit decreasing in groups of equal lengths packs exactly as one document at a time does."""

import numpy as np
import pytest

from megatron_hybrid.data.best_fit import pack_best_fit


def rooms_one_at_a_time(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each sequence by best fit decreasing, in ascending order."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(200))
def test_equal_to_one_document_at_a_time(seed):
    random = np.random.default_rng(seed)
    capacity = int(random.integers(1, 40))
    lengths = random.integers(1, capacity + 1, int(random.integers(0, 80)))
    order, offsets = pack_best_fit(lengths, capacity)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    groups = [order[first:last] for first, last in zip(offsets, offsets[1:], strict=False)]
    assert all((np.diff(group) > 0).all() and len(group) for group in groups)
    rooms = [capacity - int(lengths[group].sum()) for group in groups]
    assert sorted(rooms) == rooms_one_at_a_time(lengths.tolist(), capacity)


def test_equal_to_olmo_core():
    utils = pytest.importorskip("olmo_core.data.utils", reason="ai2-olmo-core is not installed")
    for seed in range(50):
        lengths = np.random.default_rng(seed).integers(1, 65, 150)
        ends = np.cumsum(lengths)
        instances, documents, _ = utils.InstancePacker(64).pack_documents(np.stack([ends - lengths, ends], 1))
        theirs = [64 - sum(int(documents[i, 1] - documents[i, 0]) for i in instance) for instance in instances]
        order, offsets = pack_best_fit(lengths, 64)
        assert sorted(64 - np.add.reduceat(lengths[order], offsets[:-1])) == sorted(theirs), seed


def test_many_documents_fill_the_sequences():
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1.3, 50_000).astype(int) + 1, 8192)
    _, offsets = pack_best_fit(lengths, 8192)
    assert lengths.sum() / (8192 * (len(offsets) - 1)) > 0.999


@pytest.mark.parametrize("lengths", [[0], [5, 9], [-1]])
def test_lengths_outside_a_sequence(lengths):
    with pytest.raises(ValueError, match="each must be from 1 to 8"):
        pack_best_fit(np.array(lengths), 8)
