"""Callback that finds out where a loss or gradient became non-finite."""

import math

from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.train.callbacks.base import Callback, Run
from megatron_hybrid.train.engines.megatron import MegatronEngine
from megatron_hybrid.train.nonfinite import attribute


class NonfiniteAttribution(Callback):
    """Runs the micro-batches of a step again if its loss or gradient norm is not finite, and reports where that begins.

    Writes a line to the console: rank, micro-batches reproducible or not, first module and parameter. It costs about one step for
    the first of consecutive bad steps, and nothing otherwise. Do not use it with updates that must not wait, or with an engine
    other than megatron-core's.
    """

    def __init__(self) -> None:
        self._last_bad_step = -1

    def setup(self, run: Run) -> None:
        self._run = run

    def reason_to_skip(self, loss: float, grad_norm: float) -> str | None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return None
        run, step = self._run, self._run.progress.step
        first, self._last_bad_step = step != self._last_bad_step + 1, step
        if first:
            assert isinstance(run.engine, MegatronEngine)
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
            with run.logger.pause(), heartbeat.doing(f"looking for the reason why the {what} in step {step}"):
                run.logger.info(f"step {step}: {what}; {attribute(run.engine, run.batches)}")
        return None
