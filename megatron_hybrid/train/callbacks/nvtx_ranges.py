"""Callback that marks steps with NVTX ranges."""

import torch
from megatron.core.utils import configure_nvtx_profiling

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome


class NvtxRanges(Callback):
    """Marks each step, and what megatron-core marks inside it, with NVTX ranges.

    Writes nothing itself: `nsys profile` records the ranges. Without a profiler that reads them, do not use it.

    Raises:
        ConfigError: there is no GPU.
    """

    def setup(self, run: Run) -> None:
        if not has_cuda():
            raise ConfigError.at("debug.nvtx_ranges", "true needs GPUs, and there are none; set it to false")
        configure_nvtx_profiling(True)

    def begin_step(self, run: Run) -> None:
        torch.cuda.nvtx.range_push(f"step {run.progress.step + 1}")

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        torch.cuda.nvtx.range_pop()

    def close(self) -> None:
        configure_nvtx_profiling(False)
