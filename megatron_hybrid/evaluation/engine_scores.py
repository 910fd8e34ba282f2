"""Log-likelihoods of continuations by the evaluation forward of an engine, under every parallel layout.

Each (context, continuation) is one sequence of a batch. Its loss mask counts the tokens of the continuation, and it is a source of its
own, so the engine returns its loss. Sequences are padded on the right, which causal models do not see.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.tasks import ScoringSizes
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.data.sample import Sample, SampleCounts
from megatron_hybrid.distributed.process_groups import ProcessGroupCollection
from megatron_hybrid.inference.load import NOT_FINITE_REMEDY
from megatron_hybrid.inference.prompts import check_prompts

Pair = tuple[list[int], list[int]]
"""Tokens of a context and of its continuation."""


class LossesBySource(Protocol):
    """Losses of a global batch, the same on every rank."""

    @property
    def by_source(self) -> tuple[float, ...]:
        """Mean loss of the counted tokens of each source in nats per token; NaN for a source without counted tokens."""


@dataclass(frozen=True)
class EngineScorer:
    """Scores continuations with the model of a run.

    Args:
        evaluate: runs the model on this rank's micro-batches of a global batch. Every rank calls it.
        sizes: sizes of the batches that the layout can run.
    """

    evaluate: Callable[[list[Batch]], LossesBySource]
    groups: ProcessGroupCollection
    sizes: ScoringSizes
    vocab_size: int

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[float]:
        """Return the log-likelihood of each continuation. Every rank calls it with the same pairs and gets the same results.

        Contexts that do not fit lose their beginning.

        Raises:
            UserError: a context without tokens, a continuation that is too long, or a loss that is not finite.
        """
        samples = [self._sample(*pair) for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        results: dict[int, float] = {}
        while len(results) < len(pairs):
            left = order[len(results) :]
            length = self.sizes.length(len(samples[left[0]].tokens))
            rows = self.sizes.rows(length)
            chosen = left[: rows * self.groups.dp.size() * self.sizes.micro_batches]
            found = self._global_batch([_padded(samples[i], length) for i in chosen], rows)
            results |= zip(chosen, found, strict=True)
        return [results[i] for i in range(len(pairs))]

    def _sample(self, context: list[int], continuation: list[int]) -> Sample:
        """Return the sample of a pair, without padding."""
        if len(continuation) > self.sizes.max_length:
            raise UserError(
                f"data.sequence_length {self.sizes.max_length}: a continuation has {len(continuation)} tokens, which do not fit"
            )
        whole = np.array((context + continuation)[-(self.sizes.max_length + 1) :], np.int64)
        check_prompts([whole[:-1].tolist(), whole[1:].tolist()], self.vocab_size)
        mask = np.zeros(len(whole) - 1, np.float32)
        mask[len(mask) - len(continuation) :] = 1
        counts = SampleCounts(slots=len(mask), counted=len(continuation), filtered=len(mask) - len(continuation))
        return Sample(whole[:-1], whole[1:], mask, None, counts)

    def _global_batch(self, samples: Sequence[Sample], rows: int) -> list[float]:
        """Return the log-likelihood of each sample, in micro-batches of `rows` samples."""
        ranks, length = self.groups.dp.size(), len(samples[0].tokens)
        slots = self.sizes.slots(len(samples), rows * ranks)
        filled = [*samples, *[Sample.empty(length, separated=False)] * (slots - len(samples))]
        sources = np.eye(slots, len(samples), dtype=np.float32)
        mine = np.arange(slots).reshape(-1, ranks, rows)[:, self.groups.dp.rank()]
        batches = [Batch.collate([filled[i] for i in micro]).with_sources(sources[micro]) for micro in mine]
        losses = self.evaluate(batches).by_source
        found = [-loss * sample.counts.counted for loss, sample in zip(losses, samples, strict=True)]
        if not all(map(math.isfinite, found)):
            raise UserError(f"the model's losses are not finite: {NOT_FINITE_REMEDY}")
        return found


def _padded(sample: Sample, length: int) -> Sample:
    """Return a sample padded on the right."""
    more = length - len(sample.tokens)
    tokens, labels, mask = (np.pad(x, (0, more)) for x in (sample.tokens, sample.labels, sample.loss_mask))
    return Sample(tokens, labels, mask, None, sample.counts + SampleCounts(slots=more, padding=more))
