"""Samples with document boundaries or an instance filter, in a new order every epoch, without end."""

from collections.abc import Iterable

import numpy as np

from megatron_hybrid.config.data import InstanceFilterConfig
from megatron_hybrid.data.order import SampleOrder
from megatron_hybrid.data.packing import PackingStatistics
from megatron_hybrid.data.repetitions import has_repetition
from megatron_hybrid.data.sample import Sample
from megatron_hybrid.data.sample_readers import PackedReader, SampleReader


class DocumentDataset:
    """The samples of a reader. Sample n follows from n and the seed alone."""

    def __init__(
        self,
        reader: SampleReader,
        seed: int,
        instance_filter: InstanceFilterConfig | None = None,
        shuffle: bool = True,
    ) -> None:
        """Create a dataset. With shuffle False, every epoch has the reader's own order."""
        self.reader, self.source, self.sequence_length = reader, reader.source, reader.sequence_length
        self.samples_per_epoch = reader.num_samples
        self._filter = instance_filter
        self._order = SampleOrder(self.samples_per_epoch, seed, shuffle)

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.source.name

    def position(self, index: int) -> tuple[int, int]:
        """Return (epoch, place) of the sample with this index, 0, 1, 2, ... without end."""
        return self._order.position(index)

    def sample(self, index: int) -> Sample:
        """Return the sample with this index. One that the instance filter finds has no loss."""
        sample = self.reader.read(self.position(index)[1])
        return sample.without_loss() if self._is_filtered(sample) else sample

    def _is_filtered(self, sample: Sample) -> bool:
        rule = self._filter
        if rule is None:
            return False
        tokens: np.ndarray = sample.tokens[: sample.counts.tokens]
        return has_repetition(tokens, rule.repetition_min_period, rule.repetition_max_period, rule.repetition_max_count)


def packing_statistics(datasets: Iterable[object]) -> PackingStatistics | None:
    """Return the packing statistics of all packed datasets together; None if none is packed."""
    readers = [dataset.reader for dataset in datasets if isinstance(dataset, DocumentDataset)]
    found = [reader.index.statistics for reader in readers if isinstance(reader, PackedReader)]
    return sum(found, PackingStatistics()) if found else None
