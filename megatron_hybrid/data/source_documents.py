"""The documents of a token source, found once per file and kept in the run's folder."""

from dataclasses import dataclass

import numpy as np

from megatron_hybrid.data.boundaries import boundary_origin, find_boundaries, metadata_path
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.file_array import FileArray
from megatron_hybrid.data.sources import Shard, TokenSource
from megatron_hybrid.data.work_files import WorkFiles, digest, file_state


class DocumentFinder:
    """Finds the documents of each file of a source. Every process can find those of other files."""

    def __init__(self, source: TokenSource, eos_token_id: int | None, files: WorkFiles) -> None:
        """Create a finder.

        Args:
            eos_token_id: ends the documents of files that have neither an index nor metadata.

        Raises:
            DataError: a file whose document boundaries are unknown.
        """
        self.source, self.eos_token_id, self.files = source, eos_token_id, files
        self.names = [f"boundaries-{_identity(shard, eos_token_id)}" for shard in source.shards]

    def find(self, number: int) -> None:
        """Find the documents of a file, unless the run's folder has them. Raises DataError as `find_boundaries` does."""
        name = self.names[number]
        if self.files.facts(name) is not None:
            return
        shard = self.source.shards[number]
        found = find_boundaries(shard, self.eos_token_id)
        facts = {
            "documents": len(found.bounds) - 1,
            "empty": found.empty,
            "uncovered": found.uncovered,
            "tokens": shard.num_tokens,
            "origin": boundary_origin(shard, self.eos_token_id),
        }
        self.files.write(name, {"bounds": found.bounds}, facts)

    def open(self) -> "SourceDocuments":
        """Return the documents of all files. Call it when every file's have been found.

        Raises:
            DataError: the documents of a file have not been found, or no end-of-document token occurs.
        """
        facts = [self.files.required(name) for name in self.names]
        if all(found["origin"] == "tokens" and found["documents"] == 1 for found in facts):
            raise DataError(
                f"{self.source.name}: token {self.eos_token_id} (model.eos_token_id) ends no document in it, so that documents "
                "cannot be told apart. Set model.eos_token_id to the token that ends a document, or data.documents to keep"
            )
        return SourceDocuments(
            self.source,
            self.names,
            self.files,
            np.cumsum([0, *(found["documents"] for found in facts)]),
            sum(found["empty"] for found in facts),
            sum(found["uncovered"] for found in facts),
        )


def _identity(shard: Shard, eos_token_id: int | None) -> str:
    """Return what decides the boundaries of a shard, as a name."""
    origin = boundary_origin(shard, eos_token_id)
    read = {"index": shard.index_path, "metadata": metadata_path(shard), "tokens": shard.path}[origin]
    of_tokens = (shard.dtype.str, eos_token_id) if origin == "tokens" else ()
    return digest(origin, file_state(str(read)), shard.offset, shard.num_tokens, of_tokens)


@dataclass(frozen=True)
class SourceDocuments:
    """The documents of a source in the order of its stream. Reading is safe from several threads."""

    source: TokenSource
    names: list[str]
    files: WorkFiles
    _first: np.ndarray
    """int64 [files + 1]: number of the first document of each file."""
    num_empty: int
    """Documents without tokens, which are left out."""
    num_uncovered_tokens: int
    """Tokens that metadata assigns to no document."""

    def __str__(self) -> str:
        empty = f", {self.num_empty:,} empty ones left out" if self.num_empty else ""
        uncovered = self.num_uncovered_tokens
        gaps = f", {uncovered:,} tokens outside the documents of the metadata" if uncovered else ""
        return f"{self.num_documents:,} documents in {len(self.names):,} files{empty}{gaps}"

    @property
    def num_documents(self) -> int:
        """Number of documents that have tokens."""
        return int(self._first[-1])

    def bounds(self, first: int, last: int) -> np.ndarray:
        """Return where documents [first, last) begin in the stream, and where the last of them ends: int64 [n + 1]."""
        parts, shard = [np.empty(0, np.int64)], int(np.searchsorted(self._first, first, side="right")) - 1
        while first < last:
            begin, end = int(self._first[shard]), min(last, int(self._first[shard + 1]))
            of_shard = self._of_shard(shard)[first - begin : end - begin + 1] + self.source.shard_start(shard)
            parts.append(of_shard if end == last else of_shard[:-1])
            first, shard = end, shard + 1
        return np.concatenate(parts)

    def starts_within(self, start: int, stop: int) -> np.ndarray:
        """Return the positions in the stream from `start` to before `stop` at which documents begin, ascending."""
        parts, shard = [np.empty(0, np.int64)], self.source.shard_of(start)
        while shard < len(self.names) and (offset := self.source.shard_start(shard)) < stop:
            bounds = self._of_shard(shard)
            low, high = bounds.searchsorted(start - offset), bounds.searchsorted(stop - offset)
            parts.append(bounds[low : min(high, len(bounds) - 1)] + offset)
            shard += 1
        return np.concatenate(parts)

    def _of_shard(self, shard: int) -> FileArray:
        return self.files.array(self.names[shard], "bounds")
