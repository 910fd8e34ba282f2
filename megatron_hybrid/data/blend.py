"""Blend of several datasets by weight.

Which dataset sample n comes from, and how many it has given before, follows from n alone: a binary tree has the
datasets at its leaves, and at each node the first n samples hold round(n · p) of the left side, p being the left
side's share of the weight. Both sides' counts grow by 0 or 1 with n, so the way down the tree is a choice of side and
a smaller n. No tables are built and nothing is remembered between calls. Where the weights change, counting begins again with
another tree, and each dataset continues after the samples that it has given.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_hybrid.data.dataset import FixedLengthDataset
from megatron_hybrid.data.document_dataset import DocumentDataset
from megatron_hybrid.data.generated import ENDLESS, GeneratedDataset
from megatron_hybrid.data.sample import Sample

Dataset = FixedLengthDataset | DocumentDataset | GeneratedDataset
_BITS = 53  # precision of a share in integer arithmetic, which is exact for any n
_Tree = int | tuple[int, "_Tree", "_Tree"]  # a dataset, or (share of the left side in 2^-53, left, right)


@dataclass(frozen=True)
class _Phase:
    """The samples of a blend from `first` on, until the next phase."""

    first: int
    shares: tuple[float, ...]
    tree: _Tree
    before: tuple[int, ...]
    """Samples of each dataset that the phases before took."""


class Blend:
    """Blend of datasets in proportion to their weights, which may change at given samples.

    After any number n of samples with the same weights, each dataset has given its share of n to within 1.5 samples (0.5 for two
    datasets); over any stretch of such samples this therefore holds to within 3 (1). Each dataset's own samples come in its own
    order, none left out, also across changes.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float],
        changes: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> None:
        """Create a blend.

        Args:
            datasets: of equal sequence_length.
            weights: one per dataset, at least one of them positive. A dataset with weight 0 gives no samples.
            changes: (first sample, weights from there on), in ascending order.

        Raises:
            ValueError: anything else.
        """
        if not datasets or any(len(datasets) != len(w) for w in (weights, *(w for _, w in changes))):
            raise ValueError(f"{len(datasets)} datasets and {len(weights)} weights: give as many weights, at least one")
        if len({dataset.sequence_length for dataset in datasets}) != 1:
            raise ValueError("datasets of a blend must have one sequence_length")
        self.datasets = tuple(datasets)
        self.sequence_length = datasets[0].sequence_length
        self._phases = [_phase(0, weights, (0,) * len(weights))]
        for first, changed in changes:
            if first <= self._phases[-1].first:
                raise ValueError(f"a change at sample {first}: must be above {self._phases[-1].first}")
            self._phases.append(_phase(first, changed, tuple(self.counts(first))))

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each dataset before the first change."""
        return self._phases[0].shares

    @property
    def changes(self) -> list[tuple[int, tuple[float, ...]]]:
        """First sample and shares of each change."""
        return [(phase.first, phase.shares) for phase in self._phases[1:]]

    def _phase_of(self, index: int) -> _Phase:
        return self._phases[bisect_right(self._phases, index, key=lambda phase: phase.first) - 1]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the dataset and of its sample for a sample of the blend."""
        if index < 0:
            raise IndexError(f"sample {index}: must not be negative")
        phase = self._phase_of(index)
        node, index = phase.tree, index - phase.first
        while not isinstance(node, int):
            share, left, right = node
            before = _left_count(index, share)
            if _left_count(index + 1, share) > before:
                node, index = left, before
            else:
                node, index = right, index - before
        return node, phase.before[node] + index

    def sources(self, start: int, count: int) -> np.ndarray | None:
        """Return the sources of samples [start, start + count): float32 [count, sources], 1 at each one's; None for one source."""
        if len(self.datasets) == 1:
            return None
        numbers = [self.locate(index)[0] for index in range(start, start + count)]
        return np.eye(len(self.datasets), dtype=np.float32)[numbers]

    def samples_without_repeats(self) -> int:
        """Return the largest number of samples in which no dataset repeats one. With one dataset this is all of it."""

        def repeats(num_samples: int) -> bool:
            counts = zip(self.counts(num_samples), self.datasets, strict=True)
            return any(count > dataset.samples_per_epoch for count, dataset in counts)

        if all(dataset.samples_per_epoch == ENDLESS for dataset in self.datasets):
            return ENDLESS
        most = sum(dataset.samples_per_epoch for dataset in self.datasets)
        return bisect_left(range(most + 1), True, key=lambda n: repeats(n + 1))

    def counts(self, num_samples: int) -> list[int]:
        """Return the number of samples that each dataset contributes to the first samples."""
        phase = self._phase_of(max(num_samples - 1, 0))
        counts = list(phase.before)

        def descend(node: _Tree, n: int) -> None:
            if isinstance(node, int):
                counts[node] += n
                return
            share, left, right = node
            descend(left, _left_count(n, share))
            descend(right, n - _left_count(n, share))

        descend(phase.tree, num_samples - phase.first)
        return counts

    def sample(self, index: int) -> np.ndarray | Sample:
        """Return a sample of the blend, as its dataset returns it: int64 [sequence_length + 1], or a `Sample`."""
        number, i = self.locate(index)
        dataset = self.datasets[number]
        return dataset.sample(i, index) if isinstance(dataset, GeneratedDataset) else dataset.sample(i)


def _phase(first: int, weights: Sequence[float], before: tuple[int, ...]) -> _Phase:
    for weight in weights:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight {weight}: must be finite and not negative")
    total = math.fsum(weights)
    if not total:
        raise ValueError(f"weights {list(weights)}: at least one must be positive")
    shares = tuple(weight / total for weight in weights)
    members = sorted((i for i in range(len(weights)) if weights[i]), key=lambda i: (-weights[i], i))
    return _Phase(first, shares, _build(members, shares), before)


def _left_count(n: int, share: int) -> int:
    """Return round(n · share / 2^53)."""
    return (n * share + (1 << (_BITS - 1))) >> _BITS


def _build(members: list[int], weights: Sequence[float]) -> _Tree:
    """Return the tree over datasets by descending weight. Both sides of a node have about the same weight, which minimizes the
    sum of errors.
    """
    if len(members) == 1:
        return members[0]
    sides: tuple[list[int], list[int]] = ([], [])
    sums = [0.0, 0.0]
    for member in members:
        lighter = 0 if sums[0] <= sums[1] else 1
        sides[lighter].append(member)
        sums[lighter] += weights[member]
    share = round(sums[0] / (sums[0] + sums[1]) * (1 << _BITS))
    return share, _build(sides[0], weights), _build(sides[1], weights)
