"""Attended length of a run's data (arch/documents.py), from its documents."""

import numpy as np

from megatron_hybrid.arch.documents import attended_length
from megatron_hybrid.data.blend import Blend, Dataset
from megatron_hybrid.data.document_dataset import DocumentDataset
from megatron_hybrid.data.sample_readers import PackedReader
from megatron_hybrid.data.source_documents import SourceDocuments

_PLACES, _DOCUMENTS = 64, 1024
"""Places of a source that are looked at, and documents per place."""


def blend_attended_length(blend: Blend) -> float:
    """Return the mean over all slots, padding included, of the number of tokens of the same document in the sequence."""
    return sum(share * _of_dataset(d) for share, d in zip(blend.shares, blend.datasets, strict=True))


def _of_dataset(dataset: Dataset) -> float:
    reader = dataset.reader if isinstance(dataset, DocumentDataset) else None
    if isinstance(reader, PackedReader):
        statistics = reader.index.statistics
        return statistics.squares / statistics.slots
    if reader is None or reader.documents is None:
        return dataset.sequence_length
    return attended_length(_some_lengths(reader.documents), dataset.sequence_length, packed=False)


def _some_lengths(documents: SourceDocuments) -> list[float]:
    count = min(_DOCUMENTS, documents.num_documents)
    firsts = np.unique(np.linspace(0, documents.num_documents - count, _PLACES).astype(np.int64))
    return [float(x) for first in firsts.tolist() for x in np.diff(documents.bounds(first, first + count))]
