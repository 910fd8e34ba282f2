"""Callback that logs every step."""

from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome


class StepMetrics(Callback):
    """Logs loss, gradient norm, learning rate and throughput of every step.

    Writes to metrics.jsonl, loss.png, TensorBoard, W&B and the console, as `logging` configures. Benchmarks that time
    single steps should not use it: rank 0 formats and writes a line between steps.
    """

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        run.logger.log_step(
            run.progress.step,
            {
                "loss": outcome.losses.loss,
                "z_loss": outcome.losses.z_loss,
                "grad_norm": outcome.grad_norm,
                "lr": outcome.lr,
                "batch_size": outcome.batch_size,
                "tokens": run.progress.tokens,
                "skipped": outcome.skipped,
            },
        )
