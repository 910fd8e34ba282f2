"""Schedules against megatron-core's own, and the simulation against closed forms."""

import pytest

from megatron_hybrid.planner.schedule import (
    StageTimes,
    analytic_seconds,
    chunks_in_flight,
    passes,
    simulate,
    warmup_passes,
)

SHAPES = [(2, 1, 4), (4, 1, 8), (8, 1, 32), (4, 1, 2), (2, 2, 4), (4, 2, 8), (4, 4, 8), (8, 2, 64), (4, 2, 4)]


def equal(pp: int, vpp: int, transfer: float = 0.0) -> StageTimes:
    return StageTimes([1 / vpp] * (pp * vpp), [2 / vpp] * (pp * vpp), transfer)


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), SHAPES)
def test_equal_stages_take_what_the_closed_form_says(pp, vpp, microbatches):
    timeline, waiting = simulate(equal(pp, vpp), pp, microbatches), (pp - 1) / vpp
    assert timeline.seconds == pytest.approx(analytic_seconds(equal(pp, vpp), pp, microbatches))
    assert timeline.bubble == pytest.approx(waiting / (microbatches + waiting))
    assert timeline.seconds == pytest.approx(3 * (microbatches + (pp - 1) / vpp))


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), SHAPES)
def test_every_pass_runs_once_after_what_it_needs(pp, vpp, microbatches):
    timeline = simulate(equal(pp, vpp, 0.01), pp, microbatches)
    ends = {(e.step.forward, e.step.microbatch, e.stage): e for e in timeline.events}
    assert len(ends) == len(timeline.events) == 2 * pp * vpp * microbatches
    for (forward, microbatch, stage), event in ends.items():
        before = ends.get((True, microbatch, stage - 1) if forward else (False, microbatch, stage + 1))
        assert before is None or event.start >= before.end + 0.01 - 1e-9
        assert forward or event.start >= ends[True, microbatch, stage].end
    for rank in range(pp):
        mine = sorted((e for e in timeline.events if e.rank == rank), key=lambda e: e.start)
        assert all(a.end <= b.start + 1e-9 for a, b in zip(mine, mine[1:]))


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), SHAPES)
def test_most_in_flight_is_when_the_first_backward_begins(pp, vpp, microbatches):
    timeline = simulate(equal(pp, vpp), pp, microbatches)
    assert timeline.most_in_flight == tuple(sum(chunks_in_flight(pp, vpp, microbatches, rank)) for rank in range(pp))


@pytest.mark.parametrize(("pp", "vpp", "microbatches"), [(4, 1, 8), (4, 2, 8), (2, 2, 4), (4, 3, 12)])
def test_warm_up_and_order_are_megatron_cores(pp, vpp, microbatches):
    from types import SimpleNamespace

    from megatron.core.pipeline_parallel import schedules

    table = schedules.get_schedule_table(microbatches, vpp, pp)
    for rank in range(pp):
        group = SimpleNamespace(size=lambda: pp, rank=lambda rank=rank: rank)
        virtual = vpp if vpp > 1 else None
        stub = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
        _, _, warmup, _ = schedules.get_pp_rank_microbatches(microbatches, vpp, pp, p2p_communicator=stub)
        assert warmup_passes(pp, vpp, microbatches, rank) == warmup
        forwards = [(p.microbatch, p.position) for p in passes(pp, vpp, microbatches, rank) if p.forward]
        assert forwards == [tuple(entry) for entry in table]
        backwards = [(p.microbatch, p.position) for p in passes(pp, vpp, microbatches, rank) if not p.forward]
        assert backwards == [(microbatch, vpp - 1 - chunk) for microbatch, chunk in table]


def test_a_slow_stage_sets_the_pace():
    times = StageTimes([1, 1, 3, 1], [2, 2, 6, 2])
    assert simulate(times, 4, 64).seconds == pytest.approx(analytic_seconds(times, 4, 64), rel=0.02)
    assert simulate(times, 4, 64).busy[2] == 64 * 9


def test_transfers_cost_the_pipeline_but_not_one_rank():
    assert simulate(equal(1, 1, 9.0), 1, 4).seconds == 12
    assert simulate(equal(4, 1, 0.1), 4, 8).seconds > simulate(equal(4, 1), 4, 8).seconds


def test_an_interleaved_schedule_needs_whole_groups():
    with pytest.raises(ValueError, match="multiple of 4"):
        simulate(equal(4, 2), 4, 6)
