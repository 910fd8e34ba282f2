"""MegatronEngine's life."""

import gc
import weakref

import pytest
import torch

from testing import jobs
from testing.models import SMALL


def what_is_left(train: dict, parallel: dict) -> list[str]:
    """Which parts of a closed engine that has trained a step are still in memory."""

    def watched() -> dict[str, weakref.ref]:
        engine = jobs.make_engine(SMALL, parallel, train)
        engine.forward_backward(jobs.batches_of(engine, jobs.samples_of_step(0, 2, 257), 1))
        engine.update(1e-3, engine.gradient_norm())
        parts = {
            "parameter": next(engine.chunks[0].parameters()),
            "gradient buffer": engine.wrapped[0].buffers[0],
            "optimizer state": engine.optimizer._inner_optimizers()[0].param_groups[0]["params"][0],
        }
        engine.close()
        return {name: weakref.ref(part) for name, part in parts.items()}

    references = watched()
    gc.collect()
    return [name for name, reference in references.items() if reference() is not None]


@pytest.mark.parametrize(("dtype", "offloaded"), [("fp32", 0.0), ("bf16", 0.0), ("bf16", 0.5)])
def test_a_closed_engine_leaves_no_memory_behind(dtype, offloaded, ranks):
    train = dict(steps=1, global_batch_size=2, dtype=dtype, optimizer=dict(offload_fraction=offloaded))
    assert ranks.run(what_is_left, 1, train=train, parallel={}) == [[]]


def test_nor_does_one_that_overlaps_its_collectives(ranks):
    train, overlap = dict(steps=1, global_batch_size=2), dict(overlap_grad_reduce=True, overlap_param_gather=True)
    assert ranks.run(what_is_left, 2, train=train, parallel=overlap) == [[], []]


def read_late(train: dict) -> dict:
    """Losses that are read when the next step has started, next to those that are read at once."""
    engine = jobs.make_engine(SMALL, {}, train)
    first, second = (jobs.batches_of(engine, jobs.samples_of_step(step, 2, 257), 1) for step in range(2))
    at_once = [engine.forward_backward(batches)().loss for batches in (first, second)]
    readers = [engine.forward_backward(batches) for batches in (first, second)]
    return dict(at_once=at_once, late=[read().loss for read in readers])


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_losses_may_be_read_after_the_next_step_has_started(engine, ranks):
    (found,) = ranks.run(read_late, 1, train=dict(steps=1, global_batch_size=2, engine=engine))
    assert found["late"] == found["at_once"] and len(set(found["late"])) == 2


def updated_unprepared() -> tuple[str, bool]:
    """Message of an update without a gradient norm, and whether the weights stayed."""
    engine = jobs.make_engine(SMALL, {}, dict(steps=1, global_batch_size=2))
    engine.forward_backward(jobs.batches_of(engine, jobs.samples_of_step(0, 2, 257), 1))()
    before = [parameter.clone() for parameter in engine.chunks[0].parameters()]
    with pytest.raises(RuntimeError) as error:
        engine.update(1e-3, 1.0)
    return str(error.value), all(map(torch.equal, before, engine.chunks[0].parameters()))


def test_an_update_without_a_gradient_norm_is_refused(ranks):
    ((message, stayed),) = ranks.run(updated_unprepared, 1)
    assert "needs a call of gradient_norm first" in message and stayed
