"""Calibration: factors fitted to steps of a device that is known."""

from dataclasses import replace

import pytest

from megatron_hybrid.planner import calibration
from megatron_hybrid.planner.calibration import Measured, fit_factors, predict
from megatron_hybrid.planner.calibration_file import add_runs
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.job import Job
from megatron_hybrid.planner.search import search
from tests.planner.test_memory import MODEL

HARDWARE = load("h100-80gb")


@pytest.fixture(scope="module")
def plans():
    """Layouts in which every factor matters: launch-bound ones, pipelines, exposed communication."""
    candidates = search(Job(MODEL, 16, HARDWARE, 8192, 64)).candidates
    return [candidate.plan for candidate in candidates[:: len(candidates) // 12]]


def test_factors_of_a_device_are_found_though_step_times_are_not_linear_in_them(plans, monkeypatch):
    monkeypatch.setattr(calibration, "PULL", 1e-9)
    device = HARDWARE.calibrated(dict(compute=1.1, communication=1.4, host=1.6, optimizer=0.8))
    measured = [Measured(p, s, 0) for p, s in zip(plans, predict([Measured(p, 1, 0) for p in plans], device))]
    factors = fit_factors(measured, HARDWARE)
    errors = [y / one.seconds - 1 for y, one in zip(predict(measured, HARDWARE.calibrated(factors)), measured)]
    assert max(map(abs, errors)) < 0.01
    assert factors["compute"] == pytest.approx(1.1, rel=0.01)
    assert max(abs(y / one.seconds - 1) for y, one in zip(predict(measured, HARDWARE), measured)) > 0.09


def test_every_layout_is_predicted_with_its_simulated_pipeline(plans):
    deep = [plan for plan in plans if plan.pp > 1]
    assert deep, "no pipeline among the layouts"
    predicted = predict([Measured(plan, 1, 0) for plan in deep], HARDWARE)
    measured = [Measured(plan, seconds, 0) for plan, seconds in zip(deep, predicted)]
    assert fit_factors(measured, HARDWARE) == pytest.approx(dict.fromkeys(fit_factors([], HARDWARE), 1.0), abs=1e-6)


def test_a_run_replaces_only_the_same_configuration_on_as_many_gpus():
    old = [
        dict(config={"data": {"sequence_length": s}}, gpus=g, layout="DP8", seconds=1) for s in (8, 16) for g in (8, 16)
    ]
    new = [dict(old[0], seconds=2)]
    assert add_runs(old, new) == [*old[1:], *new]


def test_memory_is_never_calibrated_below_the_prediction(plans):
    plan = plans[0]
    assert fit_factors([Measured(plan, 1, 1)], HARDWARE)["memory"] == 1
    assert fit_factors([replace(Measured(plan, 1, 1), peak_bytes=1e13)], HARDWARE)["memory"] > 1
