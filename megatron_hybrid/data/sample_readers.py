"""Readers of samples: the stream as it is, the stream cut at document boundaries, and packed documents.

Each reader gives any of its samples on its own. Their order is the dataset's business (data/document_dataset.py).
"""

from typing import Protocol

import numpy as np

from megatron_hybrid.data.dataset import count_stream_samples
from megatron_hybrid.data.packing import PackingIndex
from megatron_hybrid.data.sample import Sample, SampleCounts, starts_of
from megatron_hybrid.data.source_documents import SourceDocuments
from megatron_hybrid.data.sources import TokenSource


class SampleReader(Protocol):
    """The samples of a source by place."""

    source: TokenSource
    sequence_length: int
    num_samples: int

    @property
    def documents(self) -> SourceDocuments | None:
        """Documents of the source; None: they are not separated."""
        ...

    def read(self, place: int) -> Sample:
        """Return the sample at a place below `num_samples`. Several threads may call this."""
        ...


class StreamReader:
    """Cuts a stream at every sequence_length tokens, as `FixedLengthDataset` does."""

    def __init__(self, source: TokenSource, sequence_length: int) -> None:
        """Create a reader. Raises DataError if the stream is shorter than one sample."""
        self.source, self.sequence_length = source, sequence_length
        self.documents = None
        self.num_samples = count_stream_samples(source, sequence_length)

    def read(self, place: int) -> Sample:
        """Return the sample at a place; every label counts."""
        length = self.sequence_length
        return Sample.of_tokens(self.source.read(place * length, length + 1))


class MaskedReader:
    """Cuts a stream at the same places and separates its documents."""

    def __init__(self, documents: SourceDocuments, sequence_length: int) -> None:
        """Create a reader. Raises DataError if the stream is shorter than one sample."""
        self.documents, self.source, self.sequence_length = documents, documents.source, sequence_length
        self.num_samples = count_stream_samples(documents.source, sequence_length)

    def read(self, place: int) -> Sample:
        """Return the sample at a place. The label after the last token of a document does not count."""
        length, begin = self.sequence_length, place * self.sequence_length
        tokens = self.source.read(begin, length + 1)
        firsts = self.documents.starts_within(begin + 1, begin + length + 1) - begin
        mask = np.ones(length, np.float32)
        mask[firsts - 1] = 0.0
        counts = SampleCounts(slots=length, counted=length - len(firsts), crossing=len(firsts))
        return Sample(tokens[:-1], tokens[1:], mask, starts_of(firsts[firsts < length], length), counts)


class PackedReader:
    """Whole documents, packed. A document longer than a sequence comes in pieces, each of which is a document here.

    The label after the last token of a piece is the next token of the document, so that no token but the first of each document
    goes without a prediction. Padding has token 0 and is a document of its own that does not count.
    """

    def __init__(self, documents: SourceDocuments, index: PackingIndex, sequence_length: int) -> None:
        self.documents, self.source, self.sequence_length = documents, documents.source, sequence_length
        self.index = index
        self.num_samples = index.num_sequences

    def read(self, place: int) -> Sample:
        """Return the sample at a place."""
        length, pieces = self.sequence_length, self.index.pieces(place)
        tokens, labels = np.zeros((2, length), np.int64)
        mask = np.zeros(length, np.float32)
        ends = np.cumsum(pieces["length"], dtype=np.int64)
        firsts = ends - pieces["length"]
        for (start, size, continues), first, end in zip(pieces.tolist(), firsts.tolist(), ends.tolist()):
            read = self.source.read(start, size + continues)
            tokens[first:end] = read[:size]
            labels[first : first + len(read) - 1] = read[1:]
            mask[first : first + len(read) - 1] = 1.0
        used, crossing = int(ends[-1]), int(np.count_nonzero(~pieces["continues"]))
        counts = SampleCounts(slots=length, counted=used - crossing, crossing=crossing, padding=length - used)
        padding = [used] if used < length else []
        return Sample(tokens, labels, mask, starts_of(np.append(firsts, padding).astype(np.int64), length), counts)
