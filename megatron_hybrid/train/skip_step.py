"""Skip an update whose loss or gradient norm is an outlier among the last ones, or not finite.

The rule is that of OLMo-core's SkipStepOptimizer (3.0.0): skip where a value exceeds the mean of the window by more
than `sigmas` standard deviations (unbiased; upwards only, a sudden drop is welcome). An outlier enters the window like
any other value, so a lasting change of level stops being skipped once the window is made of it. What differs:

- A value that is not finite always skips, from the first step on, and leaves the window as it was. In OLMo-core it
  enters, turns mean and deviation into NaN, and every update is skipped until it has left, `window` steps later.
- Judging starts with half a window of earlier values (at least two); OLMo-core counts the value judged among them, and
  so starts one step earlier.
- The deviation is taken as at least 1e-6 of the mean, so that a window of equal values does not call a rounding error
  an outlier.
- The window is saved with the checkpoint. OLMo-core's starts empty after a restart.
- The decision is taken on the host, in double precision, before the optimizer is called: a skipped update leaves
  parameters and moments bit-unchanged. Given the same values it is the same on every rank: hand it reduced values.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.train import SkipStepConfig


class DivergedError(UserError):
    """Loss or gradient norm stayed non-finite for too many consecutive steps."""


class SkipStep:
    """The last finite losses and gradient norms, and what they say about the next."""

    def __init__(self, config: SkipStepConfig) -> None:
        self.config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._grad_norms: deque[float] = deque(maxlen=config.window)
        self.nonfinite_steps = 0
        """Consecutive steps, up to the last one, with a non-finite loss or gradient norm."""

    def should_skip(self, loss: float, grad_norm: float) -> str | None:
        """Judge one step and remember its values. Call it once a step, before the update.

        Args:
            loss: of the global batch, the same float on every rank.
            grad_norm: global norm before clipping, the same float on every rank.

        Returns:
            Why the update must be skipped, for the log; None: go ahead.
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
        # fsum is exact: the result does not hang on the order of the values, nor on the machine.
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
        """Stop a run that cannot recover.

        Raises:
            DivergedError: `max_nonfinite_steps` consecutive steps, `step` the last of them, were not finite.
        """
        if self.nonfinite_steps >= self.config.max_nonfinite_steps:
            raise DivergedError(
                f"loss or gradient norm was not finite in {self.nonfinite_steps} consecutive steps, the last of them step "
                f"{step}; no update was made and nothing was saved since. Rewind to a checkpoint before the loss went wrong "
                "(checkpoint.resume=RUN/checkpoints/step-N) with other data or a lower train.optimizer.lr. "
                "train.skip_step.max_nonfinite_steps sets the limit"
            )

    def state_dict(self) -> dict[str, list[float]]:
        """Plain lists of floats, oldest first."""
        return {"losses": list(self._losses), "grad_norms": list(self._grad_norms)}

    def load_state_dict(self, state: Mapping[str, Iterable[float]]) -> None:
        """Take over a window; of a longer one, the newest values.

        Raises:
            ValueError: a list is missing, or holds a value that is not finite.
        """
        windows = {}
        for name in ("losses", "grad_norms"):
            if name not in state:
                raise ValueError(f"the saved skip-step window has no {name!r}: it holds {sorted(state)}")
            windows[name] = [float(value) for value in state[name]]
            if not all(map(math.isfinite, windows[name])):
                raise ValueError(f"the saved skip-step window's {name} hold a value that is not finite")
        self._losses = deque(windows["losses"], maxlen=self.config.window)
        self._grad_norms = deque(windows["grad_norms"], maxlen=self.config.window)
