"""Callback that logs every step."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.document_dataset import packing_statistics
from megatron_hybrid.data.source_names import short_names
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.spike_score import SpikeScore


class StepMetrics(Callback):
    """Logs loss, gradient norm, learning rate and throughput of every step, and how well the first step's data is packed.

    With masked tokens it adds their shares, and with several sources the loss and the tokens of each: `source/NAME/loss` and
    `source/NAME/tokens`, slots of the run so far. Writes to metrics.jsonl, loss.png, TensorBoard, W&B and the console, as
    `logging` configures, and its count of spikes into checkpoints. Benchmarks that time single steps should not use it: rank 0
    formats and writes a line between steps.
    """

    name = "step_metrics"

    def __init__(self, training: Blend) -> None:
        self._training, self._spikes = training, SpikeScore()
        self._sources = short_names([dataset.name for dataset in training.datasets])
        packing = packing_statistics(training.datasets)
        self._once = packing.metrics() if packing else {}

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        losses = outcome.losses
        values: dict[str, Any] = {
            "loss": losses.loss,
            "z_loss": losses.z_loss,
            "grad_norm": outcome.grad_norm,
            "lr": outcome.lr,
            "batch_size": outcome.batch_size,
            "tokens": run.progress.tokens,
            "skipped": outcome.skipped,
        }
        if losses.weight > 0:
            values["spike_score"] = self._spikes.add({"loss": losses.loss, "grad_norm": outcome.grad_norm})
        if losses.counts is not None:
            values |= losses.counts.metrics()
        run.logger.log_step(run.progress.step, values | self._of_sources(run, losses.by_source) | self._once)
        self._once = {}

    def _of_sources(self, run: Run, losses: tuple[float, ...]) -> dict[str, float]:
        if not losses:
            return {}
        length = self._training.sequence_length
        samples = self._training.counts(run.progress.samples)
        tokens = {f"source/{name}/tokens": n * length for name, n in zip(self._sources, samples, strict=True)}
        found = zip(self._sources, losses, strict=True)
        return tokens | {f"source/{name}/loss": loss for name, loss in found if not math.isnan(loss)}

    def state_dict(self) -> dict[str, Any]:
        return self._spikes.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._spikes.load_state_dict(state)
