"""Callback that writes a snapshot of GPU memory when a rank runs out of it."""

from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.observe.outputs import Output
from megatron_hybrid.train.callbacks.base import Callback, Run

_ENTRIES = 100_000
"""Allocations and releases to keep."""


class MemorySnapshot(Callback):
    """Records allocations of GPU memory with their Python stacks.

    Writes `run_dir/memory/rank-N.pickle` once if the rank runs out of memory, to be opened in https://pytorch.org/memory_viz. Do not
    use it for measurements: every allocation takes longer.

    Raises:
        ConfigError: there is no GPU.
    """

    def setup(self, run: Run) -> None:
        if not has_cuda():
            raise ConfigError.at("debug.record_memory_history", "true needs GPUs, and there are none; set it to false")
        self._file = Path(run.config.run_dir) / "memory" / f"rank-{run.launch.rank:05d}.pickle"
        self._written = False
        torch.cuda.memory._record_memory_history(max_entries=_ENTRIES)
        cuda: Any = torch._C
        cuda._cuda_attach_out_of_memory_observer(self._out_of_memory)

    def _out_of_memory(self, device: int, requested: int, total: int, free: int) -> None:
        """Write the snapshot. PyTorch calls this before it raises the error."""
        if not self._written:
            self._written = True
            Output(str(self._file), print).attempt(self._write)

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(self._file))
        print(f"out of GPU memory: wrote {self._file}", flush=True)

    def close(self) -> None:
        if has_cuda():
            torch.cuda.memory._record_memory_history(enabled=None)
