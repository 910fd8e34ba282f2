"""Runs micro-batches through megatron-core's pipeline schedules."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.model.output_layer import TokenLosses
from megatron_hybrid.train.engines.base import run_model
from megatron_hybrid.train.engines.losses import BatchLosses, GlobalBatch, LossSums

_SCHEDULE_FIELDS = ("grad_scale_func", "finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func")


class BatchRunner:
    """Runs the micro-batches of a global batch through the pipeline.

    Args:
        chunks: this rank's model chunks, in their data parallel wrappers or bare.
        z_loss: weight of the z-loss in the differentiated loss.
        accuracy: count correct predictions where only the forward pass is run.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: ProcessGroupCollection,
        z_loss: float,
        accuracy: bool = False,
    ) -> None:
        self.chunks, self.groups, self.z_loss, self.accuracy = chunks, groups, z_loss, accuracy
        self.run_schedule = get_forward_backward_func()

    def __call__(self, batches: list[Batch], forward_only: bool = False) -> BatchLosses:
        """Run forward (and backward) over this rank's micro-batches. The gradients are reduced over all ranks on return.

        Args:
            batches: micro-batches of whole sequences, all of one shape, the same on all context parallel ranks of a replica.
        """
        return self.start(batches, forward_only).losses()

    def start(self, batches: Sequence[Batch], forward_only: bool = False) -> GlobalBatch:
        """Do what `__call__` does without waiting for the device, and return the global batch, which reads the losses."""
        global_batch = GlobalBatch(batches, self.groups, self.accuracy and forward_only)
        micro_batches = [partial(self.local, batch) for batch in batches]
        self.run(micro_batches, batches[0].tokens.shape, global_batch.sums, forward_only)
        return global_batch

    def run(
        self,
        micro_batches: Sequence[Callable[[], Batch]],
        whole: torch.Size,
        sums: LossSums,
        forward_only: bool = False,
    ) -> None:
        """Run the schedule.

        Args:
            micro_batches: each returns this rank's slice of a micro-batch, on its device, when its turn comes.
            whole: (b, s) of a micro-batch of whole sequences.
            sums: receives the losses.
        """
        several = len(self.chunks) > 1
        iterators = [(made() for made in micro_batches) for _ in self.chunks]
        self.run_schedule(
            forward_step_func=partial(self.forward_step, sums),
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=whole[1],
            micro_batch_size=whole[0],
            forward_only=forward_only,
        )

    def local(self, batch: Batch) -> Batch:
        """Return this rank's slice of a micro-batch of whole sequences, on its device."""
        return batch.slice(self.groups.cp.rank(), self.groups.cp.size()).to(local_device())

    def forward_step(
        self, sums: LossSums, batches: Iterator[Batch], model: torch.nn.Module
    ) -> tuple[Any, Callable[..., Any]]:
        """Run the model on the next micro-batch. Returns its output and the function that makes the loss from it."""
        heartbeat.beat()
        batch = sums.weigh(next(batches))
        output = run_model(model, batch, self.z_loss, count_correct=sums.correct is not None)
        return output, partial(self._loss, sums, batch)

    def _loss(self, sums: LossSums, batch: Batch, losses: TokenLosses) -> tuple[Tensor, dict[str, Tensor]]:
        # megatron-core multiplies the loss by the context parallel size (schedules.py, forward_step_calc_loss) and averages
        # gradients over these ranks too. All slices have the same number of tokens, so the mean of their means is exact.
        sums.add(losses, batch)
        return losses.total / self.groups.cp.size(), {}


class LossScaler(Protocol):
    """The part of an optimizer that the schedules use."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Multiply the loss by the gradient scale."""


def prepare_for_training(wrapped: list[DistributedDataParallel], optimizer: LossScaler) -> None:
    """Tell megatron-core's schedules how to finish gradients and when to communicate."""
    config = wrapped[0].module.config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    ddp = wrapped[0].ddp_config

    def for_all(method: str) -> Any:
        calls = [getattr(chunk, method) for chunk in wrapped]
        return calls if len(calls) > 1 else calls[0]

    if ddp.overlap_grad_reduce:
        config.no_sync_func = for_all("no_sync")
        if len(wrapped) > 1:
            config.grad_sync_func = for_all("start_grad_sync")
    if ddp.overlap_param_gather and len(wrapped) > 1:
        config.param_sync_func = for_all("start_param_sync")
    for chunk in wrapped[1:]:
        for field in _SCHEDULE_FIELDS:
            setattr(chunk.module.config, field, getattr(config, field))
