"""Callback that collects Python's garbage on all ranks at the same steps."""

import gc

from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome


class GarbageCollection(Callback):
    """Turns off automatic garbage collection, and collects every `interval` steps on all ranks.

    Writes nothing. Ranks that collect at different times wait for each other, and with many ranks, some rank collects in nearly every
    step. Do not use it where host memory is short and the interval long.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def start(self, run: Run) -> None:
        gc.collect()
        gc.disable()

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        if run.progress.step % self.interval == 0:
            gc.collect()

    def close(self) -> None:
        gc.enable()
