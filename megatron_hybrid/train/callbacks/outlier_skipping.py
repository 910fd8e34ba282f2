"""Callback that skips updates of bad steps."""

from collections.abc import Mapping
from typing import Any

from megatron_hybrid.config.train import SkipStepConfig
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.skip_step import SkipStep


class OutlierSkipping(Callback):
    """Skips updates whose loss or gradient norm is an outlier or not finite, and stops a run that diverged.

    Writes nothing but its window of recent values, into checkpoints. With `train.skip_step.enabled = false` it still skips
    values that are not finite; set that where outliers are expected, such as a warm-up on very mixed data.

    Raises:
        DivergedError: after too many consecutive steps that were not finite.
    """

    name = "skip_step"

    def __init__(self, config: SkipStepConfig) -> None:
        self._skip = SkipStep(config)

    def reason_to_skip(self, loss: float, grad_norm: float) -> str | None:
        return self._skip.should_skip(loss, grad_norm)

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        self._skip.check(run.progress.step)

    def state_dict(self) -> dict[str, Any]:
        return self._skip.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._skip.load_state_dict(state)
