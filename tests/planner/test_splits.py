"""Search over pipeline splits, against all splits."""

from itertools import product

import pytest

from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.planner.emit import apply_plan, load_base_run
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.job import Job
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.splits import LEAST_GAIN, faster_split, with_split
from megatron_hybrid.planner.timing import StepPredictor

HARDWARE = load("h200")


def pipeline(precision: str, pp: int, vpp: int) -> Plan:
    job = Job.of(load_base_run("olmo_hybrid_7b", 8192, 16, precision), pp, HARDWARE)
    return job.plan(ParallelConfig(pipeline_parallel_size=pp, virtual_pipeline_parallel_size=vpp), 1)


def split_of(plan: Plan) -> tuple[int, ...]:
    return tuple(len(chunk.symbols) for chunk in plan.chunks)


@pytest.fixture(scope="module")
def seconds():
    predictor = StepPredictor(HARDWARE)
    return lambda plan: predictor.step(plan).seconds, lambda plan: predictor.step(plan, simulated=True).seconds


@pytest.mark.parametrize(("precision", "pp", "vpp"), [("bf16", 2, 1), ("fp8", 2, 1), ("bf16", 4, 1), ("fp8", 2, 2)])
def test_the_split_is_as_fast_as_the_fastest_of_all(precision, pp, vpp, seconds):
    estimate, simulate = seconds
    plan = pipeline(precision, pp, vpp)
    found = faster_split(plan, estimate, simulate, lambda plan: True)
    mean = 32 // (pp * vpp)
    counts = range(max(1, mean - 4), mean + 4)
    splits = [split for split in product(counts, repeat=pp * vpp) if sum(split) == 32]
    likely = sorted((with_split(plan, split) for split in splits), key=estimate)[:30]
    assert simulate(found) <= min(map(simulate, likely)) * (1 + 2 * LEAST_GAIN)
    assert simulate(found) <= simulate(plan) and sum(split_of(found)) == 32


def test_a_faster_split_is_found_and_emitted(seconds):
    """In FP8 the output layer weighs more layers than its FLOPs say, so the default split of eight stages is not the fastest."""
    plan = pipeline("fp8", 4, 2)
    found = faster_split(plan, *seconds, lambda plan: True)
    assert split_of(found) != split_of(plan) and seconds[1](found) < seconds[1](plan)
    run = apply_plan(load_base_run("olmo_hybrid_7b", 8192, 16, "fp8"), found)
    assert run.parallel.pipeline_split == split_of(found)


def test_what_does_not_fit_is_not_chosen(seconds):
    plan = pipeline("fp8", 4, 2)
    assert faster_split(plan, *seconds, lambda plan: False) is plan
