"""Callback that ends a run early when a signal asks for it."""

from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.interrupt import Interrupt


class GracefulShutdown(Callback):
    """Stops all ranks after the same step once any rank has received SIGUSR1, SIGTERM or Ctrl-C.

    Writes nothing; the checkpoint is saved by `Checkpoints`, which must come after it. Do not use it inside a process that
    handles these signals itself.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        run.stop |= self.interrupt.agreed()

    def finish(self, run: Run) -> None:
        self.interrupt.settle()
