"""Callback that evaluates the model during training."""

from collections.abc import Sequence

from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.evaluation.validation_set import SetLoss, ValidationSet
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome


class PeriodicEvaluation(Callback):
    """Evaluates on every set of `data.validation` every `train.eval_interval` steps, at endpoints of a wsd_s schedule and at the end.

    Writes loss, perplexity, bits per byte and tokens of each set to the metrics of the step, and a line per set to the console.
    `train.eval_accuracy` adds the accuracy.
    The loss is the mean over the counted tokens of the set's first `train.eval_batches` global batches, or of the whole set.
    Training waits meanwhile, so do not use it with a short interval and large sets.
    """

    def __init__(self, config: TrainConfig, validation: Sequence[ValidationSet]) -> None:
        self.config, self.validation = config, validation
        self.results: dict[str, SetLoss] = {}
        """Results of the current step; empty if it is not evaluated."""

    def start(self, run: Run) -> None:
        reason = self.validation[0].text_bytes.unknown_reason
        if self.config.eval_interval and reason:
            run.logger.info(f"evaluation without bits per byte: {reason}")

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        self.results = self.evaluate(run) if self._is_due(run.progress.step) else {}

    def _is_due(self, step: int) -> bool:
        interval, ends = self.config.eval_interval, (*self.config.schedule.endpoints, self.config.steps)
        return interval is not None and (step % interval == 0 or step in ends)

    def evaluate(self, run: Run) -> dict[str, SetLoss]:
        """Return and log the losses of all validation sets by their names."""
        with run.logger.pause(), heartbeat.doing(f"evaluating after step {run.progress.step}", section="step"):
            losses = {found.name: found.evaluate(run.engine.evaluate) for found in self.validation}
        run.logger.log_evaluation(run.progress.step, losses)
        return losses
