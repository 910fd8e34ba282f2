"""Whole documents packed into sequences by best fit, as an index that is computed once.

The documents of a source are cut into windows of `WINDOW_DOCUMENTS`, which are packed independently: memory is bounded, and the
processes of a run share the windows. A document longer than a sequence is split into pieces of a whole sequence and a rest;
no other document is split. Each piece keeps its place in the token stream, so that any sequence can be read on its own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from megatron_hybrid.data.best_fit import pack_best_fit
from megatron_hybrid.data.source_documents import SourceDocuments
from megatron_hybrid.data.work_files import WorkFiles, digest

WINDOW_DOCUMENTS = 1 << 20
"""Most documents that are packed together: about 100 MB of memory."""
_FORMAT = 2
"""Version of the results in a run's folder."""
PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("continues", "?")])
"""A piece of a document: first token in the stream, number of tokens, and whether the document continues after it."""


@dataclass(frozen=True)
class PackingStatistics:
    """Numbers that say how well documents fill the sequences that they are packed into."""

    documents: int = 0
    pieces: int = 0
    split: int = 0
    """Documents longer than a sequence."""
    tokens: int = 0
    sequences: int = 0
    slots: int = 0
    """Sequences times their length."""
    most_pieces: int = 0
    """Most pieces in one sequence."""
    squares: int = 0
    """Sum of the squares of the pieces' lengths, to which the work of attention is proportional."""

    @property
    def efficiency(self) -> float:
        """Tokens per slot."""
        return self.tokens / self.slots if self.slots else 0.0

    def __add__(self, other: "PackingStatistics") -> "PackingStatistics":
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return PackingStatistics(**sums | {"most_pieces": max(self.most_pieces, other.most_pieces)})

    def metrics(self) -> dict[str, float]:
        """Return the values to log."""
        per_sequence = self.pieces / self.sequences if self.sequences else 0.0
        return {
            "packing_efficiency": self.efficiency,
            "packing_pieces_per_sequence": per_sequence,
            "packing_split_share": self.split / self.documents if self.documents else 0.0,
        }

    def __str__(self) -> str:
        pieces = (
            f"{self.metrics()['packing_pieces_per_sequence']:.1f} pieces per sequence (at most {self.most_pieces:,})"
        )
        return (
            f"{self.tokens:,} tokens in {self.sequences:,} sequences, {self.efficiency:.3%} of the slots filled, {pieces}, "
            f"{self.split:,} of {self.documents:,} documents split"
        )


def split_documents(bounds: np.ndarray, sequence_length: int) -> np.ndarray:
    """Return the pieces of documents: PIECE [n], in the order of the stream.

    Args:
        bounds: int64 [documents + 1], strictly ascending.
    """
    lengths = np.diff(bounds)
    counts = -(-lengths // sequence_length)
    last = np.cumsum(counts) - 1
    number = np.arange(int(counts.sum())) - np.repeat(last - counts + 1, counts)  # of a piece in its document
    pieces = np.empty(len(number), PIECE)
    pieces["start"] = np.repeat(bounds[:-1], counts) + number * sequence_length
    pieces["length"] = sequence_length
    pieces["length"][last] = lengths - (counts - 1) * sequence_length
    pieces["continues"] = True
    pieces["continues"][last] = False
    return pieces


class Packer:
    """Packs the documents of a source. Every process can pack other windows."""

    def __init__(self, documents: SourceDocuments, sequence_length: int, files: WorkFiles) -> None:
        self.documents, self.sequence_length, self.files = documents, sequence_length, files
        self.num_windows = -(-documents.num_documents // WINDOW_DOCUMENTS)
        self.name = f"packing-{digest(documents.names, sequence_length, WINDOW_DOCUMENTS, _FORMAT)}"

    def pack(self, window: int) -> None:
        """Pack a window, unless the run's folder has it."""
        name = self._window(window)
        if self.files.facts(name) is not None:
            return
        count = self.documents.num_documents
        first, last = (count * number // self.num_windows for number in (window, window + 1))
        pieces = split_documents(self.documents.bounds(first, last), self.sequence_length)
        order, offsets = pack_best_fit(pieces["length"], self.sequence_length)
        statistics = PackingStatistics(
            documents=last - first,
            pieces=len(pieces),
            split=int(np.count_nonzero(~pieces["continues"] & np.append(False, pieces["continues"][:-1]))),
            tokens=int(pieces["length"].sum(dtype=np.int64)),
            sequences=len(offsets) - 1,
            slots=(len(offsets) - 1) * self.sequence_length,
            most_pieces=int(np.diff(offsets).max()),
            squares=int(np.square(pieces["length"], dtype=np.int64).sum()),
        )
        self.files.write(name, {"pieces": pieces[order], "offsets": offsets}, asdict(statistics))

    def join(self) -> None:
        """Write the table of all windows. Call it on one process when every window is packed."""
        if self.files.facts(self.name) is None:
            found = [self.files.required(self._window(number)) for number in range(self.num_windows)]
            total = sum((PackingStatistics(**facts) for facts in found), PackingStatistics())
            sequences = np.cumsum([0, *(facts["sequences"] for facts in found)])
            self.files.write(self.name, {"sequences": sequences}, asdict(total))

    def open(self) -> "PackingIndex":
        """Return the index. Call it when `join` has returned on the process that called it."""
        return PackingIndex(
            self.files,
            [self._window(number) for number in range(self.num_windows)],
            self.files.array(self.name, "sequences"),
            PackingStatistics(**self.files.required(self.name)),
        )

    def _window(self, number: int) -> str:
        return f"{self.name}-{number:06}"


@dataclass(frozen=True)
class PackingIndex:
    """Which pieces each sequence of a packed source holds. Reading is safe from several threads."""

    files: WorkFiles
    windows: Sequence[str]
    _first: np.ndarray
    """int64 [windows + 1]: number of the first sequence of each window."""
    statistics: PackingStatistics

    @property
    def num_sequences(self) -> int:
        """Number of packed sequences."""
        return int(self._first[-1])

    def pieces(self, sequence: int) -> np.ndarray:
        """Return the pieces of a sequence in the order of the stream: PIECE [n]. Raises IndexError outside the index."""
        if not 0 <= sequence < self.num_sequences:
            raise IndexError(f"sequence {sequence} of {self.num_sequences}")
        window = int(np.searchsorted(self._first, sequence, side="right")) - 1
        name, place = self.windows[window], sequence - int(self._first[window])
        first, last = self.files.array(name, "offsets")[place : place + 2]
        return self.files.array(name, "pieces")[first:last]
