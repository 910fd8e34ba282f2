"""Decides whether to skip an update whose loss or gradient norm is an outlier or not finite.

The rule is that of OLMo-core's SkipStepOptimizer (3.0.0): skip if a value exceeds the mean of a window of recent values by
more than `sigmas` standard deviations (unbiased; only upwards). An outlier enters the window like any other value. So after
a lasting change of level, updates are skipped only until the window consists of the new values. Differences:

- A value that is not finite is always skipped, from the first step on, and does not enter the window. In OLMo-core it
  enters, turns mean and deviation into NaN, and every update is skipped for the next `window` steps.
- Decisions start after half a window of earlier values (at least two). OLMo-core counts the current value too, so it
  starts one step earlier.
- The deviation is at least 1e-6 of the mean, so that a rounding error in a window of equal values is not an outlier.
- The window is saved in checkpoints. OLMo-core's starts empty after a restart.
- The decision is made on the host, in double precision, before the optimizer is called. A skipped update leaves
  parameters and optimizer state unchanged, bit for bit. All ranks decide alike if they pass the same, reduced values.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.train import SkipStepConfig


class DivergedError(UserError):
    """Loss or gradient norm stayed non-finite for too many consecutive steps."""


class SkipStep:
    """Window of recent finite losses and gradient norms, and the decision for the next."""

    def __init__(self, config: SkipStepConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._grad_norms: deque[float] = deque(maxlen=config.window)
        self.nonfinite_steps = 0
        """Consecutive steps with a non-finite loss or gradient norm, up to the last step."""

    def should_skip(self, loss: float, grad_norm: float) -> str | None:
        """Decide on one step and record its values. Call it once per step, before the update.

        Args:
            loss: loss of the global batch, the same float on every rank.
            grad_norm: global norm before clipping, the same float on every rank.

        Returns:
            Why the update must be skipped, for the log; None: update.
        """
        values = {"loss": loss, "gradient norm": grad_norm}
        for name, value in values.items():
            if not math.isfinite(value):
                self.nonfinite_steps += 1
                return f"{name} is {value}"
        self.nonfinite_steps = 0
        if not self.config.enabled:
            return None
        reason = None
        for (name, value), window in zip(values.items(), (self._losses, self._grad_norms)):
            reason = reason or self._outlier(name, value, window)
            window.append(value)
        return reason

    def _outlier(self, name: str, value: float, window: deque[float]) -> str | None:
        if len(window) < max(2, (self.config.window + 1) // 2):
            return None
        # fsum is exact, so the result depends neither on the order of the values nor on the machine
        mean = math.fsum(window) / len(window)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in window) / (len(window) - 1))
        limit = mean + self.config.sigmas * max(deviation, 1e-6 * abs(mean))
        if value <= limit:
            return None
        return (
            f"{name} {value:.4g} is above {limit:.4g}, {self.config.sigmas:g} sigma over the mean {mean:.4g} "
            f"of the last {len(window)}"
        )

    def check(self, step: int) -> None:
        """Raise an error if the run cannot recover.

        Raises:
            DivergedError: `max_nonfinite_steps` consecutive steps up to `step` were not finite.
        """
        if self.nonfinite_steps >= self.config.max_nonfinite_steps:
            raise DivergedError(
                f"loss or gradient norm was not finite in {self.nonfinite_steps} consecutive steps, the last of them step "
                f"{step}; no update was made and no earlier checkpoint was removed since. Rewind to one before the loss went wrong "
                "(checkpoint.resume=RUN/checkpoints/step-N) with other data or a lower train.optimizer.lr. "
                "train.skip_step.max_nonfinite_steps sets the limit"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the windows as plain lists of floats, oldest first, and the number of steps in a row that were not finite."""
        windows = {"losses": list(self._losses), "grad_norms": list(self._grad_norms)}
        return windows | {"nonfinite_steps": self.nonfinite_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the windows; of longer ones, the newest values. Earlier versions did not save the number of steps.

        Raises:
            ValueError: a list is missing, or has a value that is not finite.
        """
        windows = {}
        for name in ("losses", "grad_norms"):
            if name not in state:
                raise ValueError(f"the saved skip-step window has no {name!r}: it holds {sorted(state)}")
            windows[name] = [float(value) for value in state[name]]
            if not all(map(math.isfinite, windows[name])):
                raise ValueError(f"the saved skip-step window's {name} hold a value that is not finite")
        self.nonfinite_steps = int(state.get("nonfinite_steps", 0))
        self._losses = deque(windows["losses"], maxlen=self.config.window)
        self._grad_norms = deque(windows["grad_norms"], maxlen=self.config.window)
