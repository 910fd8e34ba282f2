"""Clock, power and temperature of this rank's GPU, which NVML reports. A GPU at its power limit runs at a lower clock."""

import time
from collections.abc import Callable

_SHORTEST_PAUSE_S = 1.0
"""Seconds between readings. NVML averages the power over one second."""


class GpuState:
    """Reader of the GPU's state: `sm_clock_mhz`, `power_w` and `temperature_c`.

    A failure is reported once, and then nothing is read any more: measurements do not end a run.

    Args:
        report: prints a line.
    """

    def __init__(self, report: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._report, self._now = report, now
        self._next, self._broken = 0.0, False
        self._readings: list[dict[str, float]] = []

    def read(self) -> None:
        """Read the state, unless it was read less than a second ago."""
        if self._broken or self._now() < self._next:
            return
        self._next = self._now() + _SHORTEST_PAUSE_S
        try:
            self._readings.append(_read())
        except Exception as error:  # noqa: BLE001 - drivers raise many kinds, and a missing library another
            self._broken = True
            self._report(f"no clock and power of the GPU in the metrics: {_reason(error)}")

    def means(self) -> dict[str, float]:
        """Return the means of all readings since the last call; empty without readings."""
        found, self._readings = self._readings, []
        return {name: sum(r[name] for r in found) / len(found) for name in found[0]} if found else {}


def _read() -> dict[str, float]:
    import torch.cuda as cuda

    return {
        "sm_clock_mhz": float(cuda.clock_rate()),
        "power_w": cuda.power_draw() / 1e3,
        "temperature_c": float(cuda.temperature()),
    }


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return "the package nvidia-ml-py is not installed: pip install nvidia-ml-py"
    return f"{type(error).__name__}: {str(error)[:120]}"
