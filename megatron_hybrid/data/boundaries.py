"""Document boundaries of a token file.

They come from the first of these that exists:

1. the document indices of a megatron-core `PREFIX.idx`;
2. OLMo-core's metadata: `NAME.csv.gz` next to `NAME.npy`, whose lines begin with `start,end`;
3. end-of-document tokens in the file. An end-of-document token belongs to the document that it ends.

The end of a file ends a document. Tokens that no line of the metadata covers form documents of their own, so that the
documents of a file are always all of its tokens, in order.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import HEADER_BYTES, Index, read_index
from megatron_hybrid.data.sources import Shard

Origin = Literal["index", "metadata", "tokens"]
_CHUNK_BYTES = 16 << 20
_CHUNK_ENTRIES = 1 << 20
_LINES = 1 << 16
_LONGEST_LINE = 1 << 16
_LONGEST_START = 64  # characters that hold `start,end,`
_SPARE_ROWS = 1 << 16


@dataclass(frozen=True)
class Boundaries:
    """The documents of one file. Document i is the tokens [bounds[i], bounds[i + 1])."""

    bounds: np.ndarray
    """int64 [documents + 1], strictly ascending from 0 to the tokens of the file."""
    empty: int
    """Documents without tokens, which are left out."""
    uncovered: int
    """Tokens that the metadata assigns to no document."""


def metadata_path(shard: Shard) -> str | None:
    """Return the path of a raw shard's metadata, or None if there is none."""
    if shard.index_path is not None:
        return None
    path = shard.path.removesuffix(".npy") + ".csv.gz"
    return path if Path(path).is_file() else None


def boundary_origin(shard: Shard, eos_token_id: int | None) -> Origin:
    """Return where the boundaries of a shard come from.

    Raises:
        DataError: there is neither an index nor metadata, and no end-of-document token is known.
    """
    if shard.index_path is not None:
        return "index"
    if metadata_path(shard) is not None:
        return "metadata"
    if eos_token_id is None:
        raise DataError(
            f"{shard.path}: its document boundaries are unknown: there is no {Path(shard.path).stem}.csv.gz next to it, and "
            "model.eos_token_id is null. Set model.eos_token_id to the token that ends a document, provide the metadata, or "
            "set data.documents to keep"
        )
    return "tokens"


def find_boundaries(shard: Shard, eos_token_id: int | None) -> Boundaries:
    """Return the documents of a shard.

    Raises:
        DataError: no boundaries are known, or an index or metadata file that is damaged or contradicts the tokens.
    """
    origin = boundary_origin(shard, eos_token_id)
    if origin == "index":
        return _from_index(read_index(str(shard.index_path)), shard.num_tokens)
    if origin == "metadata":
        return _from_metadata(str(metadata_path(shard)), shard.num_tokens)
    assert eos_token_id is not None
    return _from_tokens(shard, eos_token_id)


def _from_index(index: Index, num_tokens: int) -> Boundaries:
    sequences, n = index.document_indices, len(index.lengths)
    base = HEADER_BYTES + 12 * n
    remedy = "Write the dataset again"
    if len(sequences) < 2 or sequences[0] != 0 or sequences[-1] != n:
        raise DataError(
            f"{index.path}: byte {base}: the document indices do not run from sequence 0 to {n}: the documents are unknown. "
            f"{remedy}, calling end_document after every document, or set data.documents to keep"
        )
    bounds = np.empty(len(sequences), np.int64)
    for start in range(0, len(sequences), _CHUNK_ENTRIES):
        chunk = sequences[start : start + _CHUNK_ENTRIES]
        if chunk.min() < 0 or chunk.max() > n:
            raise DataError(f"{index.path}: byte {base + 8 * start}: document indices outside 0 to {n}. {remedy}")
        inside = np.minimum(chunk, n - 1)
        tokens = index.pointers.gather(inside) // index.dtype.itemsize
        bounds[start : start + len(chunk)] = np.where(chunk == n, num_tokens, tokens)
    lengths = np.diff(bounds)
    if bounds[0] != 0 or (lengths.size and lengths.min() < 0):
        at = base + 8 * (int(np.argmax(lengths < 0)) + 1 if bounds[0] == 0 else 0)
        raise DataError(f"{index.path}: byte {at}: document indices are out of order. {remedy}")
    has_tokens = np.append(True, lengths > 0)
    empty = int(len(bounds) - has_tokens.sum())
    return Boundaries(bounds[has_tokens] if empty else bounds, empty, 0)


def _from_metadata(path: str, num_tokens: int) -> Boundaries:
    rows = _read_metadata(path, num_tokens)
    starts, ends = rows[:, 0], rows[:, 1]
    before = np.append(0, ends[:-1]) if len(rows) else ends
    wrong = np.flatnonzero((starts < before) | (ends < starts) | (ends > num_tokens))
    if wrong.size:
        line = int(wrong[0])
        raise DataError(
            f"{path}: line {line + 1}: document [{starts[line]}, {ends[line]}) overlaps the one before or exceeds the "
            f"{num_tokens} tokens of the .npy: the metadata is of another file. Copy both again, or remove the metadata to "
            "find the documents by model.eos_token_id"
        )
    last = int(ends[-1]) if len(rows) else 0
    uncovered = int((starts - before).sum()) + num_tokens - last
    bounds = np.unique(np.concatenate([[0, num_tokens], rows.ravel()]))
    return Boundaries(bounds, int((starts == ends).sum()), uncovered)


def _read_metadata(path: str, num_tokens: int) -> np.ndarray:
    """Return start and end of each line [n, 2]. Memory is bounded by the tokens, whatever the file expands to."""
    found: list[np.ndarray] = []
    rows = 0
    try:
        with gzip.open(path, "rb") as file:
            while lines := _read_lines(path, file):
                rows += len(lines)
                if rows > 2 * num_tokens + _SPARE_ROWS:
                    raise DataError(
                        f"{path}: more than {rows - len(lines):,} documents, and the .npy has {num_tokens:,} tokens: the metadata is "
                        "of another file. Copy both again"
                    )
                fields = [line.split(",", 2)[:2] for line in lines]
                try:
                    found.append(np.array(fields, dtype=np.str_).astype(np.int64).reshape(len(lines), 2))
                except (ValueError, OverflowError):
                    raise DataError(_bad_line(path, rows - len(lines), lines)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}. Copy the file again") from error
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def _read_lines(path: str, file: gzip.GzipFile) -> list[str]:
    """Return the next lines, or an empty list at the end of the file."""
    lines: list[str] = []
    while len(lines) < _LINES and (line := file.readline(_LONGEST_LINE + 1)):
        if len(line) > _LONGEST_LINE:
            raise DataError(
                f"{path}: a line of more than {_LONGEST_LINE:,} bytes: no metadata of documents. Copy the file again"
            )
        lines.append(line[:_LONGEST_START].decode("utf-8", errors="replace"))
    return lines


def _bad_line(path: str, before: int, lines: list[str]) -> str:
    """Describe the first line that does not begin with two integers."""
    for number, line in enumerate(lines, before + 1):
        fields = line.split(",", 2)[:2]
        if len(fields) < 2 or not all(field.strip().isdecimal() for field in fields):
            return f"{path}: line {number}: {line.strip()[:80]!r} does not begin with `start,end` of a document"
    return f"{path}: line {before + 1}: a number is too large"


def _from_tokens(shard: Shard, eos_token_id: int) -> Boundaries:
    tokens, step = shard.tokens(), _CHUNK_BYTES // shard.dtype.itemsize
    found = [np.zeros(1, np.int64)]
    for start in range(0, shard.num_tokens, step):
        found.append(np.flatnonzero(tokens[start : start + step] == eos_token_id) + start + 1)
    bounds = np.concatenate(found)
    return Boundaries(bounds if bounds[-1] == shard.num_tokens else np.append(bounds, shard.num_tokens), 0, 0)
