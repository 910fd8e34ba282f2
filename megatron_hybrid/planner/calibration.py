"""Calibration: run the best layouts with the real trainer, and fit factors to the differences from the predictions.

A calibration file holds measured steps, each with the configuration of its run, and the fitted factors. A factor says how much longer
than predicted computation, communication, kernel launches or the optimizer take. It is near 1 unless the steps say otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.planner.fit import fit_near_one
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.memory import fullest
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.timing import StepPredictor

FACTORS = ("compute", "communication", "host", "optimizer")
PULL = 0.02
"""Weight with which a factor is held at 1, relative to a measured step."""
ITERATIONS, TOLERANCE, DIFFERENCE = 30, 1e-6, 1e-3
Run = dict[str, Any]
"""One measured layout as the file holds it: layout, gpus, date, device, config, seconds, peak_bytes."""


@dataclass(frozen=True)
class Measured:
    """A layout with its measured step."""

    plan: Plan
    seconds: float
    """Median of the measured steps."""
    peak_bytes: float
    """Highest memory of any rank; 0 if the device does not report it."""

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> Self:
        """Return what a calibration file's run says."""
        config = RunConfig.model_validate(run["config"])
        return cls(Plan.of(config, run["gpus"]), run["seconds"], run.get("peak_bytes", 0))


def predict(measured: Sequence[Measured], hardware: Hardware) -> list[float]:
    """Return the predicted seconds of a step of each, its pipeline simulated."""
    predictor = StepPredictor(hardware)
    return [predictor.step(one.plan, simulated=True).seconds for one in measured]


def fit_factors(measured: Sequence[Measured], hardware: Hardware) -> dict[str, float]:
    """Fit a factor per kind of time, and one for memory.

    The step time is not linear in the factors: launches count only where computation does not hide them, communication only where
    it is exposed, and the slowest stage decides. So this is Gauss-Newton, on predictions with the factors found so far.
    """
    factors = dict.fromkeys(FACTORS, 1.0)
    for _ in range(ITERATIONS):
        found = _next_factors(measured, hardware, factors)
        change = max(abs(found[name] - factors[name]) for name in FACTORS)
        factors = found
        if change < TOLERANCE:
            break
    over = [one.peak_bytes / fullest(one.plan).total for one in measured if one.peak_bytes]
    return factors | {"memory": max([1.0, *over])}  # never below 1: a layout that is said to fit must fit


def _next_factors(measured: Sequence[Measured], hardware: Hardware, factors: Mapping[str, float]) -> dict[str, float]:
    """Return the factors that fit best if the step times were linear in them around the given ones."""
    at = predict(measured, hardware.calibrated(factors))
    columns = []
    for name in FACTORS:
        moved = predict(measured, hardware.calibrated({**factors, name: factors[name] + DIFFERENCE}))
        columns.append([(y - x) / DIFFERENCE for x, y in zip(at, moved)])
    seconds = [one.seconds for one in measured]
    linear = [sum(factors[name] * column[i] for name, column in zip(FACTORS, columns)) for i in range(len(at))]
    targets = [y - x + z for x, y, z in zip(at, seconds, linear)]
    found = fit_near_one(columns, targets, seconds, PULL * max(1, len(measured)))
    return dict(zip(FACTORS, found, strict=True))


def format_comparison(measured: Sequence[Measured], hardware: Hardware, factors: Mapping[str, float]) -> str:
    """Return a line per run: measured and predicted, before and after calibration."""
    lines = ["measured:"]
    predicted = predict(measured, hardware), predict(measured, hardware.calibrated(factors))
    for one, before, after in zip(measured, *predicted, strict=True):
        errors = ", ".join(f"{name} {x / one.seconds - 1:+.1%}" for name, x in (("before", before), ("after", after)))
        memory = fullest(one.plan).total
        held = f"; {one.peak_bytes / 1e9:.1f} GB, predicted {memory / 1e9:.1f}" if one.peak_bytes else ""
        lines.append(f"  {one.plan.label}: {one.seconds:.3f} s per step, predicted {before:.3f} ({errors}){held}")
    return "\n".join(lines)
