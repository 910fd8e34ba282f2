"""One optimizer step: forward and backward over the micro-batches by megatron-core's schedule, and the update."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_hybrid.distributed.context_parallel import slice_of_sequences
from megatron_hybrid.distributed.device import local_device

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Losses:
    """Means over a global batch, the same numbers on every rank. nats a token; z_loss unweighted."""

    loss: float
    z_loss: float


class BatchRunner:
    """Runs the micro-batches of a global batch through the pipeline.

    Args:
        chunks: this rank's model chunks, in their data parallel wrappers or bare.
        z_loss: weight of the z-loss in what is differentiated.
    """

    def __init__(
        self, chunks: list, groups: ProcessGroupCollection, sequence_length: int, micro_batch_size: int, z_loss: float
    ):
        self.chunks, self.groups, self.z_loss = chunks, groups, z_loss
        self.sequence_length, self.micro_batch_size = sequence_length, micro_batch_size
        self.run_schedule = get_forward_backward_func()

    def __call__(self, batches: list[Batch], forward_only: bool = False) -> Losses:
        """Forward (and backward) of this rank's micro-batches; gradients are reduced over all ranks when it returns.

        Args:
            batches: micro-batches of `tokens`, `labels` [b, s] int64 and `loss_mask` [b, s], whole sequences, the same on all
                context parallel ranks of a replica.
        """
        several = len(self.chunks) > 1
        iterators = [iter(batches) for _ in self.chunks]
        outputs = self.run_schedule(
            forward_step_func=self._forward_step,
            data_iterator=iterators if several else iterators[0],
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )
        return self._mean(outputs)

    def _forward_step(self, batches: Iterator[Batch], model):
        batch = {name: slice_of_sequences(x, self.groups.cp) for name, x in next(batches).items()}
        batch = on_device(batch)
        output = model(batch["tokens"], batch["labels"], batch["loss_mask"], self.z_loss)
        return output, self._loss

    def _loss(self, losses: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        total, cross_entropy, z_loss = losses
        # megatron-core multiplies it by the context parallel size (schedules.py, forward_step_calc_loss) and averages gradients over
        # these ranks as well: all slices have as many tokens, so their means' mean is the sequences'
        return total / self.groups.cp.size(), {"losses": torch.stack((cross_entropy, z_loss))}

    def _mean(self, outputs: Iterable[dict[str, Tensor]]) -> Losses:
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return mean_losses([output["losses"] for output in outputs], self.groups)
        return mean_losses([torch.zeros(2, device=local_device())], self.groups)  # the last stage's are added to it


def on_device(batch: Batch) -> Batch:
    """A micro-batch's `tokens`, `labels` and `loss_mask` on this rank's device."""
    return {name: batch[name].to(local_device(), non_blocking=True) for name in ("tokens", "labels", "loss_mask")}


def mean_losses(losses: list[Tensor], groups: ProcessGroupCollection) -> Losses:
    """Of each micro-batch's (cross-entropy, z-loss) on this rank to the means of all ranks; zeros where a stage has none."""
    mean = torch.stack(losses).mean(0)
    dist.all_reduce(mean, group=groups.dp_cp)
    mean /= groups.dp_cp.size()
    if groups.pp.size() > 1:
        dist.all_reduce(mean, group=groups.pp)
    loss, z_loss = mean.tolist()
    return Losses(loss, z_loss)


def prepare_for_training(wrapped: list, optimizer) -> None:
    """Tell megatron-core's schedules how to finish gradients and when to communicate."""
    config = wrapped[0].module.config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    ddp = wrapped[0].ddp_config

    def for_all(method: str):
        calls = [getattr(chunk, method) for chunk in wrapped]
        return calls if len(calls) > 1 else calls[0]

    if ddp.overlap_grad_reduce:
        config.no_sync_func = for_all("no_sync")
        if len(wrapped) > 1:
            config.grad_sync_func = for_all("start_grad_sync")
    if ddp.overlap_param_gather and len(wrapped) > 1:
        config.param_sync_func = for_all("start_param_sync")
    for chunk in wrapped[1:]:
        for field in (
            "grad_scale_func",
            "finalize_model_grads_func",
            "no_sync_func",
            "grad_sync_func",
            "param_sync_func",
        ):
            setattr(chunk.module.config, field, getattr(config, field))
