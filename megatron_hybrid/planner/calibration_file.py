"""Calibration files: measured steps of one kind of GPU, and the factors fitted to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_hybrid.base import yaml_text
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.command_line import read_yaml
from megatron_hybrid.planner.calibration import Measured, Run, fit_factors
from megatron_hybrid.planner.hardware import Hardware


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
        _check(path, run, hardware)
    return runs


def _is_run(run: Any) -> bool:
    """Return True if `run` has the form of what `measure.measure` returns."""
    if not isinstance(run, dict):
        return False
    numbers = [run.get("seconds"), run.get("gpus"), run.get("peak_bytes", 0)]
    texts = [run.get("layout"), run.get("device", "")]
    return all(type(x) in (int, float) and x >= 0 for x in numbers) and all(isinstance(text, str) for text in texts)


def _check(path: Path, run: Run, hardware: Hardware) -> None:
    layout = run["layout"]
    if not is_device(run.get("device", hardware.name), hardware):
        raise ConfigError.at(
            str(path),
            f"{layout} was measured on {run['device']}, not on {hardware.name}; remove that run from it, or give another "
            "--calibration",
        )
    if "config" not in run:
        raise ConfigError.at(
            str(path),
            f"{layout} does not say what was run: an earlier version measured it; remove it, and measure again",
        )
    try:
        Measured.of(run)
    except (ValidationError, ConfigError) as error:
        raise ConfigError.at(
            str(path), f"{layout}: its config is not one of this version ({error}); remove it, and measure again"
        ) from None


def is_device(device: str, hardware: Hardware) -> bool:
    """Return True if a device, by the name that CUDA gives it, is the hardware's GPU."""
    return device.strip().lower() == hardware.name.strip().lower()


def add_runs(runs: Sequence[Run], fresh: Sequence[Run]) -> list[Run]:
    """Return old and new runs. A new one replaces the old one of the same configuration and number of GPUs."""
    new = [(run["config"], run["gpus"]) for run in fresh]
    return [run for run in runs if (run["config"], run["gpus"]) not in new] + list(fresh)


def write_calibration(path: Path, hardware: Hardware, runs: Sequence[Run]) -> None:
    """Write runs and the factors fitted to them."""
    factors = fit_factors([Measured.of(run) for run in runs], hardware)
    text = yaml_text.write({"gpu": hardware.name, "factors": factors, "runs": list(runs)})
    path.write_text(text, encoding="utf-8")
