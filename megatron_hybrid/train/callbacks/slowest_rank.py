"""Callback that reports the slowest rank."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.distributed.device import local_device, node_name
from megatron_hybrid.train.callbacks.base import Callback, Run, StepOutcome
from megatron_hybrid.train.engines.megatron import MegatronEngine


class SlowestRank(Callback):
    """Reports the slowest rank of every `interval` steps.

    Writes a line to the console: for the slowest rank, the time from the begin of a step to the reduction of its gradients, with the
    median over all ranks. The time includes reading data, and waiting for ranks of the same tensor, context and pipeline parallel
    groups, so these appear equally slow. It costs two CUDA events per step, and a gather of one number per rank and interval.
    Do not use it with an engine other than megatron-core's.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def setup(self, run: Run) -> None:
        assert isinstance(run.engine, MegatronEngine)
        for chunk in run.engine.wrapped:
            config = chunk.module.config
            config.finalize_model_grads_func = self._timed(config.finalize_model_grads_func)
        self._hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(self._hosts, node_name())

    def _timed(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        def record_and_finalize(*args: Any, **kwargs: Any) -> Any:
            self._end.record()
            return finalize(*args, **kwargs)

        return record_and_finalize

    def begin_step(self, run: Run) -> None:
        self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def end_step(self, run: Run, outcome: StepOutcome) -> None:
        self._events.append((self._begin, self._end))
        if run.progress.step % self.interval == 0:
            self._report(run)

    def _report(self, run: Run) -> None:
        steps = len(self._events)
        seconds = sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3 / steps
        self._events.clear()
        mine = torch.tensor([seconds], device=local_device())
        found = [torch.zeros_like(mine) for _ in self._hosts]
        dist.all_gather(found, mine)
        if run.launch.rank == 0:
            times = torch.cat(found).tolist()
            rank = max(range(len(times)), key=times.__getitem__)
            run.logger.info(
                f"slowest of the last {steps} steps: rank {rank} on {self._hosts[rank]}, {times[rank]:.3g} s per step before the "
                f"reduction of gradients; median of all ranks {median(times):.3g} s"
            )
