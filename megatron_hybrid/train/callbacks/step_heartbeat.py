"""Callback that tells the watchdog about steps."""

from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome


class StepHeartbeat(Callback):
    """Records the begin and the end of steps in the heartbeat of the process.

    Writes nothing. The watchdog (train/watchdog/) and the handling of requests to stop (launch/stop_signals.py) read it, so do not
    leave it out of a run that uses them.
    """

    def begin_step(self, run: Run) -> None:
        heartbeat.begin_step(run.progress.step)

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        heartbeat.end_step(run.progress.step)
