"""Evaluate a model on validation sets: mean loss over all counted tokens, perplexity, bits per byte, and accuracy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.loader import BatchLoader, Dataset
from megatron_hybrid.data.sample import Sample
from megatron_hybrid.data.text_bytes import TextBytes
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.distributed.process_groups import ProcessGroupCollection


class MeanLoss(Protocol):
    """Mean loss of a global batch, the same on every rank."""

    @property
    def loss(self) -> float:
        """Mean over the counted tokens in nats per token."""

    @property
    def weight(self) -> float:
        """Number of counted tokens."""

    @property
    def correct(self) -> int | None:
        """Number of counted tokens whose label has the highest logit; None: not counted."""


@dataclass(frozen=True)
class SetLoss:
    """Loss of a validation set."""

    loss: float
    """Mean over all counted tokens in nats per token; NaN if none counts."""
    tokens: int
    """Counted tokens."""
    text_bytes: float
    """Bytes of text of the counted tokens; NaN if they are unknown."""
    accuracy: float | None = None
    """Share of the counted tokens whose label has the highest logit; None: not counted."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for each byte of text; None if the bytes are unknown."""
        return self.loss * self.tokens / math.log(2) / self.text_bytes if self.text_bytes > 0 else None

    def metrics(self) -> dict[str, float]:
        """Return the values to log."""
        bits = self.bits_per_byte
        more = {} if bits is None else {"bits_per_byte": bits}
        more |= {} if self.accuracy is None else {"accuracy": self.accuracy}
        return {"loss": self.loss, "perplexity": self.perplexity, **more, "tokens": self.tokens}

    def __str__(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.4f}"
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:,.4g}{bits}{accuracy}"


class ValidationSet:
    """The first samples of a dataset, shared by the data parallel ranks.

    The result depends neither on the number of ranks nor on the micro-batch size, but for rounding: samples that fill the last
    global batch do not count.

    Args:
        name: empty for a set without a name.
        num_samples: samples to evaluate.
        batch_size: sequences per call of the model over all ranks, a multiple of `unit`.
        unit: fewest sequences per call.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        num_samples: int,
        groups: ProcessGroupCollection,
        micro_batch_size: int,
        batch_size: int,
        unit: int,
        text_bytes: TextBytes,
    ) -> None:
        self.name, self.num_samples, self.text_bytes = name, num_samples, text_bytes
        self._groups, self._batch_size, self._unit = groups, batch_size, unit
        self._loader = BatchLoader(
            _Padded(dataset, num_samples),
            micro_batch_size,
            data_parallel_rank=groups.dp.rank(),
            data_parallel_size=groups.dp.size(),
            num_workers=0,
        )
        self._bytes: float | None = None  # the same in every evaluation

    def evaluate(
        self, evaluate: Callable[[list[Batch]], MeanLoss], report: Callable[[int], None] = lambda samples: None
    ) -> SetLoss:
        """Return the loss of the set. Every rank calls it.

        Args:
            evaluate: runs the model on this rank's micro-batches of a global batch.
            report: receives the number of samples that are done, after each global batch.
        """
        losses, weights, correct, text_bytes = [], [], list[int](), 0.0
        for first in range(0, self.num_samples, self._batch_size):
            left = self.num_samples - first
            size = min(self._batch_size, -(-left // self._unit) * self._unit)
            batches = list(self._loader.global_batch(first, size))
            text_bytes += 0.0 if self._bytes is not None else sum(map(self.text_bytes.count, batches))
            mean = evaluate(batches)
            if mean.weight > 0:
                losses.append(mean.loss * mean.weight)
                weights.append(mean.weight)
            if mean.correct is not None:
                correct.append(mean.correct)
            report(min(first + size, self.num_samples))
        if self._bytes is None:
            self._bytes = self._sum_over_ranks(text_bytes)
        tokens = math.fsum(weights)
        loss, accuracy = math.nan, None
        if tokens:
            loss, accuracy = math.fsum(losses) / tokens, sum(correct) / tokens if correct else None
        return SetLoss(loss, round(tokens), self._bytes, accuracy)

    def _sum_over_ranks(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=local_device())
        dist.all_reduce(total, group=self._groups.dp)
        return float(total)


class _Padded:
    """The first samples of a dataset with their counts, followed by samples that do not count."""

    def __init__(self, dataset: Dataset, num_samples: int) -> None:
        self.dataset, self.num_samples, self.sequence_length = dataset, num_samples, dataset.sequence_length

    def sample(self, index: int) -> Sample:
        return self._padding if index >= self.num_samples else self._read(index)

    def _read(self, index: int) -> Sample:
        sample = self.dataset.sample(index)
        return Sample.of_tokens(sample) if isinstance(sample, np.ndarray) else sample

    @cached_property
    def _padding(self) -> Sample:
        return Sample.empty(self.sequence_length, separated=self._read(0).starts is not None)
