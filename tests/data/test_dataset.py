"""Every token is predicted once an epoch, in an order that the index alone decides."""

import pytest

from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.data.errors import DataError
from tests.data.files import counting_source


@pytest.mark.parametrize(("num_tokens", "length"), [(101, 10), (110, 10), (100, 10), (11, 10), (1000, 7), (2, 1)])
def test_every_token_is_predicted_once_an_epoch(tmp_path, num_tokens, length):
    dataset = FixedLengthDataset(counting_source(tmp_path / "a.npy", num_tokens), length, seed=1)
    n = dataset.samples_per_epoch
    assert n == (num_tokens - 1) // length
    for epoch in range(3):
        labels = []
        for i in range(n):
            sample = dataset.sample(epoch * n + i)
            assert len(sample) == length + 1 and (sample == range(sample[0], sample[0] + length + 1)).all()
            labels += sample[1:].tolist()
        assert sorted(labels) == list(range(1, n * length + 1))


def test_order(tmp_path):
    source = counting_source(tmp_path / "a.npy", 1001)
    dataset = FixedLengthDataset(source, 10, seed=1)

    def order(dataset, epoch):
        return [dataset.position(epoch * 100 + i) for i in range(100)]

    assert [epoch for epoch, _ in order(dataset, 5)] == [5] * 100
    assert order(dataset, 0) != [(0, i) for i in range(100)]
    assert [i for _, i in order(dataset, 0)] != [i for _, i in order(dataset, 1)]
    assert order(dataset, 0) != order(FixedLengthDataset(source, 10, seed=2), 0)
    again = FixedLengthDataset(source, 10, seed=1)
    for index in [150, 3, 99_999, 100, 3]:  # any order of access
        assert again.position(index) == FixedLengthDataset(source, 10, seed=1).position(index)
    assert order(again, 7) == order(dataset, 7)


def test_unshuffled(tmp_path):
    dataset = FixedLengthDataset(counting_source(tmp_path / "a.npy", 101), 10, seed=1, shuffle=False)
    assert [dataset.position(i) for i in (0, 1, 9, 10, 25)] == [(0, 0), (0, 1), (0, 9), (1, 0), (2, 5)]


def test_errors(tmp_path):
    source = counting_source(tmp_path / "a.npy", 10)
    with pytest.raises(DataError, match=r"a.npy: 10 tokens do not make one sample: sequence_length 10 needs 11"):
        FixedLengthDataset(source, 10, seed=0)
    with pytest.raises(IndexError):
        FixedLengthDataset(source, 9, seed=0).sample(-1)
