"""Callback that evaluates the model during training."""

from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.data.loader import BatchLoader
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome


class PeriodicEvaluation(Callback):
    """Evaluates on `data.validation` every `train.eval_interval` steps and after the last step.

    Writes `eval_loss` to the metrics of the step and a line to the console. The mean is over the first
    `train.eval_batches` global batches, the same ones every time. Training waits meanwhile, so do not use it with a short
    interval and many batches.
    """

    def __init__(self, config: TrainConfig, validation: BatchLoader) -> None:
        self.config, self.validation = config, validation

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        step, interval = run.progress.step, self.config.eval_interval
        if interval and (step % interval == 0 or step == self.config.steps):
            self.evaluate(run)

    def evaluate(self, run: Run) -> float:
        """Return and log the mean loss over the validation batches."""
        size = self.config.global_batch_size
        with run.logger.pause(), heartbeat.doing(f"evaluating after step {run.progress.step}"):
            losses = [
                run.engine.evaluate(list(self.validation.global_batch(number * size, size))).loss
                for number in range(self.config.eval_batches)
            ]
        loss = sum(losses) / len(losses)
        run.logger.log_eval(run.progress.step, loss)
        return loss
