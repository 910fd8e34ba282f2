"""Calibration: run the best layouts with the real trainer, and fit factors to the differences from the predictions.

A calibration file holds every measured step next to its prediction by part, and the fitted factors. A factor says how much longer
than predicted computation, communication, kernel launches or the optimizer take. It is near 1 unless the steps say otherwise.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.base import yaml_text
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.command_line import read_yaml
from megatron_hybrid.planner.fit import fit_near_one
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.parts import LAUNCHES, OPTIMIZER
from megatron_hybrid.planner.timing import StepTime

GROUPS = ("compute", "communication", "host", "optimizer")
PULL = 0.02
"""Weight with which a factor is held at 1, relative to a measured step."""
Run = dict[str, Any]
"""One measured layout: `predicted` seconds by group before calibration, `seconds`, `peak_bytes`, predicted `memory`, ..."""


def group_seconds(step: StepTime) -> dict[str, float]:
    """Return a step's seconds by the factor that scales them. A bubble waits for computation."""
    found = dict.fromkeys(GROUPS, 0.0)
    for part, seconds in step.parts.items():
        found[_group(part)] += seconds
    return found


def _group(part: str) -> str:
    if part == LAUNCHES:
        return "host"
    if part == OPTIMIZER:
        return "optimizer"
    return "communication" if part.endswith(" communication") else "compute"


def fit_factors(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Fit a factor per group of seconds, and one for memory."""
    columns = [[run["predicted"][group] for run in runs] for group in GROUPS]
    factors = dict(zip(GROUPS, fit_near_one(columns, [run["seconds"] for run in runs], PULL * max(1, len(runs)))))
    over = [run["peak_bytes"] / run["memory"] for run in runs if run.get("peak_bytes")]
    return factors | {"memory": max([1.0, *over])}  # never below 1: a layout that is said to fit must fit


def read_calibration(path: Path, hardware: Hardware) -> list[Run]:
    """Return the runs of a calibration file; none if it does not exist yet, or is empty.

    Raises:
        ConfigError: it belongs to another GPU, was measured on another device, or is no calibration file.
    """
    if not path.exists():
        return []
    data = read_yaml("calibration", path)
    if data is None:
        return []
    if not isinstance(data, dict) or data.get("gpu") != hardware.name:
        gpu = data.get("gpu") if isinstance(data, dict) else None
        raise ConfigError.at(
            str(path), f"is a calibration of {gpu}, not of {hardware.name}; give another --calibration"
        )
    runs = data.get("runs") or []
    if not isinstance(runs, list) or not all(map(_is_run, runs)):
        raise ConfigError.at(
            str(path), "is damaged: its runs are not what --measure writes; remove it, and measure again"
        )
    for run in runs:
        if not is_device(run.get("device", hardware.name), hardware):
            raise ConfigError.at(
                str(path),
                f"{run['layout']} was measured on {run['device']}, not on {hardware.name}; remove that run from it, or give another "
                "--calibration",
            )
    return runs


def _is_run(run: Any) -> bool:
    """Return True if `run` has the form of what `measure.measure` returns."""
    if not isinstance(run, dict) or not isinstance(run.get("predicted"), dict):
        return False
    numbers = [run.get("seconds"), run.get("memory"), run.get("peak_bytes", 0), *map(run["predicted"].get, GROUPS)]
    texts = [run.get("layout"), run.get("device", "")]
    return all(type(x) in (int, float) and x >= 0 for x in numbers) and all(isinstance(text, str) for text in texts)


def is_device(device: str, hardware: Hardware) -> bool:
    """Return True if a device, by the name that CUDA gives it, is the hardware's GPU."""
    return device.strip().lower() == hardware.name.strip().lower()


def write_calibration(path: Path, hardware: Hardware, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write runs and the factors fitted to them."""
    text = yaml_text.write({"gpu": hardware.name, "factors": fit_factors(runs), "runs": list(runs)})
    path.write_text(text, encoding="utf-8")


def format_comparison(runs: Sequence[Mapping[str, Any]], factors: Mapping[str, float]) -> str:
    """Return a line per run: measured and predicted, before and after calibration."""
    lines = ["measured:"]
    for run in runs:
        before = sum(run["predicted"].values())
        after = sum(seconds * factors.get(group, 1.0) for group, seconds in run["predicted"].items())
        errors = ", ".join(
            f"{name} {x / run['seconds'] - 1:+.1%}" for name, x in (("before", before), ("after", after))
        )
        memory = (
            f"; {run['peak_bytes'] / 1e9:.1f} GB, predicted {run['memory'] / 1e9:.1f}" if run.get("peak_bytes") else ""
        )
        lines.append(f"  {run['layout']}: {run['seconds']:.3f} s per step, predicted {before:.3f} ({errors}){memory}")
    return "\n".join(lines)
