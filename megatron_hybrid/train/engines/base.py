"""The interface between the trainer and the engine that holds the model."""

from collections.abc import Callable
from typing import Any, Protocol

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.checkpoint.collect import Collector
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.train.engines.losses import BatchLosses


class UpdateCount(Protocol):
    """The part of an engine's optimizer that the trainer uses."""

    @property
    def updates(self) -> int:
        """Number of updates so far, without skipped steps."""

    def set_updates(self, count: int) -> None:
        """Restore the number of updates after loading a checkpoint."""


class Engine(Protocol):
    """The model on this rank and its optimizer. Every rank calls the same methods in the same order."""

    @property
    def groups(self) -> ProcessGroupCollection:
        """Process groups of this rank."""

    @property
    def optimizer(self) -> UpdateCount:
        """The optimizer, with its count of updates."""

    def forward_backward(self, batches: list[Batch]) -> Callable[[], BatchLosses]:
        """Launch forward and backward passes over this rank's micro-batches, and return the function that waits for the mean losses of
        the global batch.

        Gradients of a skipped step are discarded.
        """

    def gradient_norm(self) -> float:
        """Return the global gradient norm, averaged over the batch, before clipping."""

    def update(self, lr: float, gradient_norm: float) -> None:
        """Clip by the given norm and update, after `gradient_norm`. To skip a step, do not call this: then nothing has changed."""

    def evaluate(self, batches: list[Batch]) -> BatchLosses:
        """Return the mean losses over a global batch, without gradients."""

    def collector(self) -> Collector:
        """Return the object that reads and writes this rank's weights and optimizer state for checkpoints."""

    def backends(self, batch_size: int) -> list[str]:
        """Return a table of the formats and kernels that this rank runs, with reasons."""

    def close(self) -> None:
        """Release GPU memory."""


def run_model(model: Callable[..., Any], batch: Batch, z_loss: float, count_correct: bool = False) -> Any:
    """Run the model on a micro-batch: `TokenLosses` on the last pipeline stage, hidden states on the others."""
    return model(batch.tokens, batch.labels, batch.loss_mask, z_loss, batch.documents, batch.cu_seqlens, count_correct)
