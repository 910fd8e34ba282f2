"""Callback that describes the run when it starts and when it is done. The only file of `train` that imports the planner."""

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch

from megatron_hybrid.base.errors import as_storage_error
from megatron_hybrid.config.summary import summary
from megatron_hybrid.data.blend import Blend
from megatron_hybrid.data.generated import ENDLESS
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.planner.memory import expected
from megatron_hybrid.train.callbacks.base import Callback, Run

FORMATS_FILE = "formats.txt"
"""File in run_dir with the formats and kernels of the run, and why they were chosen."""


class RunSummary(Callback):
    """Prints what runs and where: model, layout, tokens, epochs, run folder, expected memory, kernels; at the end, the pace.

    Writes to the console, and `run_dir/formats.txt`. It warns of a source that repeats more often than `data.repeat_warning`. Memory
    is predicted on GPUs, with megatron-core's engine only. Every run needs it: `start` makes the engine choose its kernels.
    """

    def __init__(self, training: Blend) -> None:
        self.training = training

    def start(self, run: Run) -> None:
        table = run.engine.backends(run.config.train.micro_batch_size)  # on all ranks, which may test kernels together
        self._began, self._first_step, self._first_tokens = time.monotonic(), run.progress.step, run.progress.tokens
        if run.launch.rank > 0:
            return
        epochs = self._epochs(run)
        for line in summary(run.config, run.launch.world_size, _device(), epochs, _memory(run)):
            run.logger.info(line)
        self._report_formats(run, table)
        _warn_of_repeats(run, epochs)

    def _epochs(self, run: Run) -> list[float]:
        """Return the epochs of each source by the last step; none if all are generators, which never repeat a sample."""
        if all(dataset.samples_per_epoch == ENDLESS for dataset in self.training.datasets):
            return []
        counts = self.training.counts(run.config.train.samples_after(run.config.train.steps))
        return [n / dataset.samples_per_epoch for n, dataset in zip(counts, self.training.datasets, strict=True)]

    def _report_formats(self, run: Run, table: list[str]) -> None:
        """Print the kernels without the reasons, which take up to 250 columns, and write the whole table to a file."""
        file = Path(run.config.run_dir) / FORMATS_FILE
        try:
            file.write_text("\n".join(table) + "\n")
        except OSError as error:
            run.logger.info(f"{as_storage_error(error) or error}; the run continues without {FORMATS_FILE}")
        if has_cuda():
            reasons = table[0].index("why")
            for line in table:
                run.logger.info(line[:reasons].rstrip())
        run.logger.info(f"kernels and formats, with reasons: {file}")

    def finish(self, run: Run) -> None:
        steps, tokens = run.progress.step - self._first_step, run.progress.tokens - self._first_tokens
        seconds = time.monotonic() - self._began
        if run.progress.step >= run.config.train.steps:
            run.logger.info(
                f"done: {steps:,} steps, {tokens:,} tokens in {timedelta(seconds=round(seconds))}, {tokens / seconds:,.0f} tokens/s "
                f"with saves and evaluation"
            )


def _warn_of_repeats(run: Run, epochs: Sequence[float]) -> None:
    limit = run.config.data.repeat_warning
    for number, value in enumerate(epochs):
        if value > limit:
            run.logger.info(
                f"warning: data.train.{number} repeats {value:.3g} times, more than data.repeat_warning = {limit:g}; give it more "
                "tokens or a lower weight"
            )


def _device() -> str:
    return torch.cuda.get_device_name() if has_cuda() else "CPU"


def _memory(run: Run) -> str | None:
    if not has_cuda() or run.config.train.engine != "megatron":
        return None
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f"{expected(run.config, run.launch.world_size).line()}; the GPU has {total / 1e9:.0f} GB"
