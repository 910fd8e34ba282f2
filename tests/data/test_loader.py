"""The samples of a step do not depend on how it is cut, and follow from consumed_samples."""

import threading
import time

import numpy as np
import pytest
import torch

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.data.sources import open_source
from tests.data.files import write_raw


class Numbers:
    """Sample i is i, i + 1, ..., i + s; remembers what was asked and by whom."""

    sequence_length = 4

    def __init__(self, bad: int | None = None):
        self.bad, self.asked, self.threads = bad, [], set()

    def sample(self, index: int) -> np.ndarray:
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        if index == self.bad:
            raise OSError(f"sample {index} cannot be read")
        return np.arange(index, index + self.sequence_length + 1)


def firsts(batches) -> list[list[int]]:
    """The first token, here the sample's number, of every sequence of every micro-batch."""
    return [batch.tokens[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_a_micro_batch_holds(workers):
    with BatchLoader(Numbers(), 2, num_workers=workers) as loader:
        first, second = loader.global_batch(10, 4)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in first.tensors().items()} == {
        "tokens": (torch.int64, (2, 4)),
        "labels": (torch.int64, (2, 4)),
        "loss_mask": (torch.float32, (2, 4)),
    }
    assert first.tokens.tolist() == [[10, 11, 12, 13], [11, 12, 13, 14]]
    assert first.labels.tolist() == [[11, 12, 13, 14], [12, 13, 14, 15]]
    assert (first.loss_mask == 1).all() and second.tokens[0, 0] == 12
    assert all(tensor.is_contiguous() for tensor in first.tensors().values())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_a_global_batch_is_the_same_however_it_is_cut(size, micro, workers):
    consumed, global_batch_size = 7, 48
    loaders = [
        BatchLoader(Numbers(), micro, data_parallel_rank=rank, data_parallel_size=size, num_workers=workers)
        for rank in range(size)
    ]
    parts = [firsts(loader.global_batch(consumed, global_batch_size)) for loader in loaders]
    assert {len(part) for part in parts} == {loaders[0].num_micro_batches(global_batch_size)} == {48 // (size * micro)}
    # In the order (micro-batch, rank, sequence) it is the samples in their order.
    together = [sample for step in zip(*parts, strict=True) for micro_batch in step for sample in micro_batch]
    assert together == list(range(consumed, consumed + global_batch_size))
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_run_with_a_batch_ramp_and_resumes(workers):
    """Any sequence of requests gives what a fresh loader gives."""
    sizes = [4, 4, 8, 12, 12, 4]
    with BatchLoader(Numbers(), 2, data_parallel_rank=1, data_parallel_size=2, num_workers=workers) as loader:
        for start in (0, 100, 40):  # a resume forward, then back
            consumed = start
            for size in sizes:
                seen = firsts(loader.global_batch(consumed, size))
                assert seen == [[consumed + 4 * m + 2, consumed + 4 * m + 3] for m in range(size // 4)]
                consumed += size


def test_a_batch_left_half_read_does_not_matter():
    with BatchLoader(Numbers(), 1, num_workers=2) as loader:
        next(loader.global_batch(0, 8))
        assert firsts(loader.global_batch(8, 2)) == [[8], [9]]
        batches = loader.global_batch(10, 2)
        other = loader.global_batch(50, 2)
        assert firsts([next(batches), next(other), next(batches), next(other)]) == [[10], [50], [11], [51]]


def test_going_on_reads_nothing_twice_across_a_ramp():
    dataset = Numbers()
    with BatchLoader(dataset, 1, num_workers=2, read_ahead=4) as loader:
        consumed = 0
        for size in (2, 4, 8, 8):
            list(loader.global_batch(consumed, size))
            consumed += size
    assert len(dataset.asked) == len(set(dataset.asked)) and set(range(consumed)) <= set(dataset.asked)
    assert max(dataset.asked) < consumed + 4  # and no further ahead than asked


def test_it_reads_ahead_in_threads():
    dataset = Numbers()
    with BatchLoader(dataset, 1, num_workers=2, read_ahead=6) as loader:
        next(loader.global_batch(0, 1))
        deadline = time.monotonic() + 10
        while len(dataset.asked) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(dataset.asked) == list(range(7))
    assert all(name.startswith("data") for name in dataset.threads)


def test_no_workers_read_in_the_caller():
    dataset = Numbers()
    list(BatchLoader(dataset, 1, num_workers=0).global_batch(0, 3))
    assert dataset.asked == [0, 1, 2] and dataset.threads == {threading.current_thread().name}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_threads_error_is_raised_where_its_micro_batch_is(workers):
    with BatchLoader(Numbers(bad=5), 1, num_workers=workers) as loader:
        assert firsts(loader.global_batch(0, 4)) == [[0], [1], [2], [3]]  # 5 is read ahead already
        batches = loader.global_batch(4, 4)
        assert firsts([next(batches)]) == [[4]]
        with pytest.raises(OSError, match="sample 5 cannot be read"):
            next(batches)
        assert firsts(loader.global_batch(6, 2)) == [[6], [7]]  # it can go on after it


def test_close_ends_the_threads():
    before = threading.active_count()
    loader = BatchLoader(Numbers(), 1, num_workers=3)
    batches = loader.global_batch(0, 8)
    next(batches)
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before
    for use in (lambda: loader.global_batch(0, 8), lambda: next(batches)):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.parametrize(
    "wrong",
    [
        {"micro_batch_size": 0},
        {"data_parallel_rank": 2, "data_parallel_size": 2},
        {"data_parallel_rank": -1},
        {"num_workers": -1},
    ],
)
def test_wrong_sizes(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        BatchLoader(Numbers(), **{"micro_batch_size": 1, **wrong})


def test_wrong_requests():
    loader = BatchLoader(Numbers(), 2, data_parallel_size=3, num_workers=0)
    for size, nearest in ((1, 6), (10, 12), (6 * 100 + 1, 600), (0, 6)):
        with pytest.raises(ValueError, match=rf"global_batch_size {size} is no multiple .* = 6: nearest is {nearest}"):
            loader.global_batch(0, size)
    with pytest.raises(ValueError, match="must not be negative"):
        loader.global_batch(-1, 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_token_is_named_by_the_rank_that_reads_it(tmp_path, workers):
    tokens = np.zeros(330, int)
    tokens[200] = 300
    source = open_source(SourceConfig(path=write_raw(tmp_path / "a.npy", tokens)), 257)
    dataset = FixedLengthDataset(source, 32, seed=0)
    with BatchLoader(dataset, 1, num_workers=workers) as loader, pytest.raises(DataError) as caught:
        list(loader.global_batch(0, dataset.samples_per_epoch))
    assert "a.npy: byte 400: token 300 (number 200, uint16)" in str(caught.value)
    assert caught.value.printed_by == "each rank"
