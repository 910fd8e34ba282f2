"""Losses of a global batch: means over all counted tokens, for any loss mask, layout and micro-batch size.

The model returns means over all slots of a micro-batch, masked or not. `GlobalBatch` multiplies the loss masks by slots / weight,
where the weight is the sum of all loss masks of the global batch. The mean of the micro-batches' means is then the mean over
the counted tokens of the global batch, and the gradients are those of this mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.sample import SampleCounts
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.model.output_layer import TokenLosses

_NUM_COUNTS = len(fields(SampleCounts))


@dataclass(frozen=True)
class BatchLosses:
    """Mean losses over the counted tokens of a global batch in nats per token, the same on every rank."""

    loss: float
    """NaN if no token counts."""
    z_loss: float
    """Unweighted."""
    weight: float
    """Sum of the loss masks: the number of counted tokens."""
    counts: SampleCounts | None = None
    """What the slots of the global batch hold. None: every token counts."""
    by_source: tuple[float, ...] = ()
    """Loss of each source of the blend, NaN for a source without counted tokens. Empty if batches name no sources."""
    correct: int | None = None
    """Number of counted tokens whose label has the highest logit. None: not counted."""


class LossSums:
    """Losses of this rank's micro-batches of one global batch. They stay on the device, and nothing here waits for it.

    Args:
        scale: fp32 scalar on the device that multiplies the loss masks; None: they stay as they are.
        sources: number of sources that the batches name; None: they name none.
        count_correct: correct predictions are counted.
    """

    def __init__(self, scale: Tensor | None, sources: int | None, count_correct: bool = False) -> None:
        self.scale = scale
        self.means: list[Tensor] = []
        device = local_device()
        self.correct = torch.zeros(1, dtype=torch.float64, device=device) if count_correct else None
        self.by_source = None if sources is None else torch.zeros(sources, 2, dtype=torch.float64, device=device)

    def weigh(self, batch: Batch) -> Batch:
        """Return a batch on the device with its loss mask multiplied by the scale."""
        return batch if self.scale is None else replace(batch, loss_mask=batch.loss_mask * self.scale)

    def add(self, losses: TokenLosses, batch: Batch) -> None:
        """Record the losses of one micro-batch, or of this rank's slice of it.

        Args:
            batch: as `weigh` returned it.
        """
        self.means.append(torch.stack((losses.cross_entropy, losses.z_loss)))
        if losses.correct is not None and self.correct is not None:
            self.correct += losses.correct
        if batch.sources is not None and self.by_source is not None:
            per_sequence = (losses.per_token.t(), batch.loss_mask)  # both [b, s]
            sums = torch.stack([values.sum(1, dtype=torch.float64) for values in per_sequence], 1)
            self.by_source += batch.sources.t().double() @ sums


class GlobalBatch:
    """The losses of one global batch, of which each data parallel rank runs some micro-batches.

    All ranks create it before their first forward pass. The sums over ranks stay on the device until `losses` reads them.

    Attributes:
        sums: receives the losses of this rank's micro-batches. Its scale is slots / weight.

    Args:
        batches: this rank's micro-batches of whole sequences.
        count_correct: correct predictions are counted.
    """

    def __init__(self, batches: Sequence[Batch], groups: ProcessGroupCollection, count_correct: bool = False) -> None:
        self.groups = groups
        self.slots = groups.dp.size() * sum(batch.labels.numel() for batch in batches)
        self._totals: Tensor | None = None
        scale = None
        if batches[0].counts is not None:
            self._totals = _totals(batches, groups)
            weight = self._totals[0]
            scale = torch.where(weight > 0, self.slots / weight, 0.0).float()
        sources = batches[0].sources
        self.sums = LossSums(scale, None if sources is None else sources.shape[1], count_correct)

    def losses(self) -> BatchLosses:
        """Sum over all ranks and return the losses. Pipeline stages without losses contribute zeros."""
        return self.start_reading()()

    def start_reading(self) -> Callable[[], BatchLosses]:
        """Sum over all ranks, without waiting for the device. Return the function that waits and returns the losses."""
        sums = self.sums
        mean = torch.stack(sums.means).mean(0) if sums.means else torch.zeros(2, device=local_device())
        self._sum_over_ranks(mean, divide=True)
        parts = [mean.double()]
        if self._totals is not None:
            parts.append(self._totals)
        if sums.by_source is not None:
            self._sum_over_ranks(sums.by_source)
            parts.append(sums.by_source[:, 0] / sums.by_source[:, 1])
        if sums.correct is not None:
            self._sum_over_ranks(sums.correct)
            parts.append(sums.correct)
        return partial(self._read, _to_host(torch.cat(parts)))

    def _sum_over_ranks(self, values: Tensor, divide: bool = False) -> None:
        """Sum over data, context and pipeline parallel ranks, or average over the first two."""
        if self.groups.dp_cp.size() > 1:
            dist.all_reduce(values, group=self.groups.dp_cp)
            if divide:
                values /= self.groups.dp_cp.size()
        if self.groups.pp.size() > 1:
            dist.all_reduce(values, group=self.groups.pp)

    def _read(self, arrived: Callable[[], list[float]]) -> BatchLosses:
        loss, z_loss, *rest = arrived()
        correct = None if self.sums.correct is None else round(rest.pop())
        if self._totals is None:
            return BatchLosses(loss, z_loss, self.slots, by_source=tuple(rest), correct=correct)
        weight, counts = rest[0], SampleCounts(*map(int, rest[1 : 1 + _NUM_COUNTS]))
        if weight == 0:
            loss = z_loss = float("nan")
        return BatchLosses(loss, z_loss, weight, counts, tuple(rest[1 + _NUM_COUNTS :]), correct)


def _to_host(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy values from the device. Return the function that waits for them."""
    if not values.is_cuda:
        return values.tolist
    kept, copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True), torch.cuda.Event()
    kept.copy_(values, non_blocking=True)
    copied.record()

    def arrived() -> list[float]:
        copied.synchronize()
        found: list[float] = kept.tolist()
        return found

    return arrived


def _totals(batches: Sequence[Batch], groups: ProcessGroupCollection) -> Tensor:
    """Return the sum of all loss masks and the fields of `SampleCounts`, over all micro-batches of all ranks: fp64, on the device."""
    weight = sum(float(batch.loss_mask.sum(dtype=torch.float64)) for batch in batches)
    counts = sum((batch.counts for batch in batches if batch.counts is not None), SampleCounts())
    values = torch.tensor([weight, *astuple(counts)], dtype=torch.float64)
    totals = values.to(local_device(), non_blocking=True)
    if groups.dp.size() > 1:
        dist.all_reduce(totals, group=groups.dp)
    return totals
