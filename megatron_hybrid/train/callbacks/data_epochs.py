"""Callback that reports how often the training sources repeat."""

from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.generated import ENDLESS
from megatron_hybrid.train.callbacks.base import Callback, Run


class DataEpochs(Callback):
    """Prints the epochs of each source by the last step, and warns where a source repeats more often than data.repeat_warning.

    Writes to the console only, at the start of a run, and nothing about generators, which never repeat a sample.
    """

    def __init__(self, training: Blend) -> None:
        self.training = training

    def start(self, run: Run) -> None:
        counts = self.training.counts(run.config.train.samples_after(run.config.train.steps))
        datasets = self.training.datasets
        if all(dataset.samples_per_epoch == ENDLESS for dataset in datasets):
            return
        epochs = [n / dataset.samples_per_epoch for n, dataset in zip(counts, datasets, strict=True)]
        names = [f"data.train.{number}" for number in range(len(epochs))]
        known = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, epochs, strict=True))
        run.logger.info(f"epochs by the last step: {known}")
        limit = run.config.data.repeat_warning
        for name, value in zip(names, epochs, strict=True):
            if value > limit:
                run.logger.info(
                    f"warning: {name} repeats {value:.3g} times, more than data.repeat_warning = {limit:g}; give it more tokens or a "
                    "lower weight"
                )
