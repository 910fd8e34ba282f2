"""SpikeScore: the share of steps whose loss or gradient norm is far off the mean of the steps before.

The score compares the stability of runs (OLMo 2, arXiv 2501.00656). Here a value is a spike if it is more than 6 standard
deviations off the mean of the last 128 values, or not finite. It is judged from half a window of values on.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW, SIGMAS = 128, 6.0


class SpikeScore:
    """Counts steps with spikes."""

    def __init__(self) -> None:
        self._windows: dict[str, deque[float]] = {}
        self.steps = self.spikes = 0

    def add(self, values: Mapping[str, float]) -> float:
        """Record the values of a step by name. Return the share of spikes so far, 0 to 1."""
        windows = [self._windows.setdefault(name, deque(maxlen=WINDOW)) for name in values]
        found = [_is_spike(value, window) for value, window in zip(values.values(), windows, strict=True)]
        for value, window in zip(values.values(), windows, strict=True):
            if math.isfinite(value):
                window.append(value)
        self.steps += 1
        self.spikes += any(found)
        return self.spikes / self.steps

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        windows = {name: list(window) for name, window in self._windows.items()}
        return {"steps": self.steps, "spikes": self.spikes, "windows": windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.steps, self.spikes = state["steps"], state["spikes"]
        self._windows = {name: deque(values, maxlen=WINDOW) for name, values in state["windows"].items()}


def _is_spike(value: float, window: deque[float]) -> bool:
    if not math.isfinite(value):
        return True
    if len(window) < WINDOW // 2:
        return False
    mean = math.fsum(window) / len(window)  # exact, so the same on every machine
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in window) / (len(window) - 1))
    return abs(value - mean) > SIGMAS * max(deviation, 1e-6 * abs(mean))
