"""Forward and backward passes of training steps as CUDA graphs. The design is in train/cuda_graph.py."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.train.cuda_graph import GraphedCall, Recorder
from megatron_hybrid.train.engines.losses import GlobalBatch, LossSums
from megatron_hybrid.train.engines.schedule import BatchRunner

MOST_GRAPHS = 8
"""Shapes of global batches whose graphs are kept, the most recent ones."""


class GraphedPasses:
    """Runs the forward and backward passes of training steps as `BatchRunner` does, as a graph after the warm-up.

    Args:
        runner: of one model chunk.
        warmup: steps of each shape without a graph.
    """

    def __init__(self, runner: BatchRunner, warmup: int, recorder: Recorder) -> None:
        self.runner, self.warmup, self.recorder = runner, warmup, recorder
        self._steps: dict[Any, _Step] = {}

    @property
    def captured(self) -> int:
        """Number of graphs that are kept."""
        return sum(step.passes.replay is not None for step in self._steps.values())

    def start(self, batches: Sequence[Batch]) -> GlobalBatch:
        """Run forward and backward, and the reduction of gradients, without waiting for the device. See `BatchRunner.start`."""
        global_batch = GlobalBatch(batches, self.runner.groups)
        cp, scale = self.runner.groups.cp, global_batch.sums.scale
        mine = _with_one_capacity([batch.slice(cp.rank(), cp.size()) for batch in batches])
        step = self._step(mine, batches[0].tokens.shape, scale)
        step.load(mine, scale)
        with _without_finalizing(self.runner.chunks):
            step.passes()
        heartbeat.beat()  # replays have none
        chunk: Any = self.runner.chunks[0]
        chunk.module.config.finalize_model_grads_func(list(self.runner.chunks), None)
        global_batch.sums = step.sums
        return global_batch

    def _step(self, mine: Sequence[Batch], whole: torch.Size, scale: Tensor | None) -> "_Step":
        """Return the step of this shape; the oldest shape is forgotten."""
        shape = tuple((name, x.shape, x.dtype) for batch in mine for name, x in batch.tensors().items()), scale is None
        step = self._steps.pop(shape, None) or _Step(self, mine, whole, scale)
        self._steps[shape] = step
        if len(self._steps) > MOST_GRAPHS:
            del self._steps[next(iter(self._steps))]
        return step


class _Step:
    """Passes over micro-batches of one shape, with the tensors that they read and write."""

    def __init__(self, passes: GraphedPasses, mine: Sequence[Batch], whole: torch.Size, scale: Tensor | None) -> None:
        self.runner, self.whole = passes.runner, whole
        self.batches = [_empty_like(batch) for batch in mine]
        self.scale = None if scale is None else torch.empty_like(scale)
        self.sums = self._new_sums()
        self.passes = GraphedCall(self._run, passes.warmup, passes.recorder)
        # megatron-core keeps the tables of 32 lengths; a graph would read memory that another length's table has by then
        length, documents = mine[0].tokens.shape[1], mine[0].documents is not None
        models: list[Any] = [chunk.module for chunk in self.runner.chunks]
        self.tables = [table for model in models for table in model.angle_tables(length, documents)]

    def load(self, mine: Sequence[Batch], scale: Tensor | None) -> None:
        """Copy the inputs of a step."""
        for kept, batch in zip(self.batches, mine, strict=True):
            for name, x in batch.tensors().items():
                getattr(kept, name).copy_(x, non_blocking=True)
        if self.scale is not None and scale is not None:
            self.scale.copy_(scale)

    def _run(self) -> None:
        self.sums = self._new_sums()
        self.runner.run([partial(_get, batch) for batch in self.batches], self.whole, self.sums)

    def _new_sums(self) -> LossSums:
        sources = self.batches[0].sources
        return LossSums(self.scale, None if sources is None else sources.shape[1])


def _get(batch: Batch) -> Batch:
    return batch


def _empty_like(batch: Batch) -> Batch:
    """Return a batch of the same shapes on the device."""
    made = {name: torch.empty(x.shape, dtype=x.dtype, device=local_device()) for name, x in batch.tensors().items()}
    return replace(batch, counts=None, **made)


def _with_one_capacity(batches: list[Batch]) -> list[Batch]:
    """Return the micro-batches with room for equally many documents in `Batch.cu_seqlens`. The added documents are empty."""
    lengths = [len(batch.cu_seqlens) for batch in batches if batch.cu_seqlens is not None]
    if len(set(lengths)) < 2:
        return batches
    return [_with_capacity(batch, max(lengths)) for batch in batches]


def _with_capacity(batch: Batch, length: int) -> Batch:
    assert batch.cu_seqlens is not None and batch.documents is not None
    missing, tokens = length - len(batch.cu_seqlens), batch.documents.numel()
    return replace(batch, cu_seqlens=F.pad(batch.cu_seqlens, (0, missing), value=tokens))


@contextmanager
def _without_finalizing(chunks: Sequence[Any]) -> Iterator[None]:
    """Let the schedule leave every rank's own gradients."""
    configs = [chunk.module.config for chunk in chunks]
    before = [config.finalize_model_grads_func for config in configs]
    for config in configs:
        config.finalize_model_grads_func = None
    try:
        yield
    finally:
        for config, function in zip(configs, before, strict=True):
            config.finalize_model_grads_func = function
