"""Callback that profiles some steps with torch's profiler."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.observe.outputs import Output
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome


class TorchProfiler(Callback):
    """Profiles steps `start` to `end` on some ranks.

    Writes `run_dir/profiles/steps-START-END-rank-N.json.gz`, to be opened in https://ui.perfetto.dev. Profiled steps are slower, and
    traces of many steps are large. Do not use it for measurements of throughput.
    """

    def __init__(self, start: int, end: int, ranks: tuple[int, ...]) -> None:
        self.start_step, self.end, self.ranks = start, end, ranks
        self._profile: profile | None = None

    def begin_step(self, run: Run) -> None:
        if run.progress.step + 1 == self.start_step and run.launch.rank in self.ranks:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_cuda() else [])]
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
        if self._profile is not None:
            self._step = torch.profiler.record_function(f"step {run.progress.step + 1}")
            self._step.__enter__()

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        if self._profile is None:
            return
        self._step.__exit__(None, None, None)
        if run.progress.step >= self.end or run.stop:
            with run.logger.pause():
                self._write(run)

    def _write(self, run: Run) -> None:
        recorded, self._profile = self._profile, None
        assert recorded is not None
        recorded.stop()
        folder = Path(run.config.run_dir) / "profiles"
        file = folder / f"steps-{self.start_step}-{run.progress.step}-rank-{run.launch.rank:05d}.json.gz"

        def write() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(file))
            print(f"rank {run.launch.rank}: wrote {file}", flush=True)

        Output(str(file), print).attempt(write)

    def finish(self, run: Run) -> None:
        """Write the trace of a run that ends before `profile_step_end`."""
        if self._profile is not None:
            self._write(run)

    def close(self) -> None:
        if self._profile is not None:
            self._profile.stop()
