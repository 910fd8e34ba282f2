"""Callbacks of the trainer, and those of an ordinary run in their order."""

from collections.abc import Sequence

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.evaluation.validation_set import ValidationSet
from megatron_hybrid.train.callbacks.base import Callback
from megatron_hybrid.train.callbacks.checkpoints import Checkpoints
from megatron_hybrid.train.callbacks.debugging import debugging_callbacks
from megatron_hybrid.train.callbacks.graceful_shutdown import GracefulShutdown
from megatron_hybrid.train.callbacks.outlier_skipping import OutlierSkipping
from megatron_hybrid.train.callbacks.periodic_evaluation import PeriodicEvaluation
from megatron_hybrid.train.callbacks.replica_check import ReplicaCheck
from megatron_hybrid.train.callbacks.run_summary import RunSummary
from megatron_hybrid.train.callbacks.step_heartbeat import StepHeartbeat
from megatron_hybrid.train.callbacks.step_metrics import StepMetrics
from megatron_hybrid.train.callbacks.task_evaluation import TaskEvaluation
from megatron_hybrid.train.interrupt import Interrupt


def default_callbacks(
    config: RunConfig, training: Blend, validation: Sequence[ValidationSet], interrupt: Interrupt | None
) -> list[Callback]:
    """Return the callbacks of a run, in the order in which their hooks are called.

    A step is logged before anything that may end the run. It is evaluated before it is saved. The summary comes last, so that it
    stands directly above the first step.

    Args:
        training: blend that training reads.
        validation: sets to evaluate on.
        interrupt: receives signals that ask the run to stop; None: the process handles signals itself.
    """
    callbacks: list[Callback] = [
        StepHeartbeat(),
        StepMetrics(training),
        OutlierSkipping(config.train.skip_step),
        *debugging_callbacks(config),
    ]
    if validation:
        callbacks.append(PeriodicEvaluation(config.train, validation))
    if config.tasks.paths:
        callbacks.append(TaskEvaluation(config.tasks))
    if interrupt is not None:
        callbacks.append(GracefulShutdown(interrupt))
    if config.train.engine == "megatron" and config.train.replica_check_interval is not None:
        callbacks.append(ReplicaCheck(config.train.replica_check_interval))
    return [*callbacks, Checkpoints(), RunSummary(training)]
