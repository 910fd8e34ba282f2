"""TrainConfig.batch_size_at: the borders of the ramp, and megatron-core's old rule, which 0.19 no longer offers."""

import pytest

from megatron_hybrid.config.train import BatchRampConfig, TrainConfig


def train_config(size=64, start=16, increment=16, samples=300):
    ramp = BatchRampConfig(start=start, increment=increment, samples=samples)
    return TrainConfig(steps=1000, global_batch_size=size, batch_ramp=ramp)


def test_no_ramp():
    train = TrainConfig(steps=1, global_batch_size=48)
    assert {train.batch_size_at(c) for c in (0, 1, 10**12)} == {48}
    assert train.samples_after(7) == 7 * 48


def test_equal_increments_over_the_samples():
    train = train_config()
    borders = {0: 16, 99: 16, 100: 32, 199: 32, 200: 48, 299: 48, 300: 64, 10**9: 64}
    assert {c: train.batch_size_at(c) for c in borders} == borders


@pytest.mark.parametrize("size, start, increment, samples", [(64, 16, 16, 300), (4096, 32, 32, 10_001), (7, 1, 2, 10)])
def test_megatron_cores_rule(size, start, increment, samples):
    train = train_config(size, start, increment, samples)
    per_increment = samples / ((size - start) // increment)  # RampupBatchsizeNumMicroBatchesCalculator of core 0.18
    consumed = steps = 0
    while consumed <= samples:
        theirs = start + int(consumed / per_increment) * increment
        assert train.batch_size_at(consumed) == min(theirs, size)
        assert train.samples_after(steps) == consumed
        consumed, steps = consumed + min(theirs, size), steps + 1
    assert train.batch_size_at(consumed) == size
    assert train.samples_after(steps + 5) == consumed + 5 * size


def test_a_ramp_from_the_full_size_is_none():
    assert train_config(size=16, start=16).batch_size_at(0) == 16
