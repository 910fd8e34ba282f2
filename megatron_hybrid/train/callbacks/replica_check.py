"""Callback that compares the parameters of data parallel ranks."""

from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.callbacks.checkpoints import saves_now
from megatron_hybrid.train.engines.megatron import MegatronEngine


class ReplicaCheck(Callback):
    """Ends the run if data parallel ranks hold different parameters, before such a state is saved.

    Compares checksums every `train.replica_check_interval` steps and before every checkpoint. Writes nothing. A check reads the
    parameters once on the device, reduces 16 bytes per tensor, and waits for the device. Do not use it in measurements of single
    steps.

    Raises:
        ReplicaError: names the ranks and the first tensor that differ.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        assert isinstance(run.engine, MegatronEngine)
        if run.engine.groups.dp_cp.size() > 1 and (run.progress.step % self.interval == 0 or saves_now(run, outcome)):
            with run.logger.pause():
                run.engine.check_replicas(run.progress.step)
