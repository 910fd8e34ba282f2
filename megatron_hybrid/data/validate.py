"""Every token and every index entry, looked at before training starts.

The scan runs as fast as the files can be read, and its verdict (the largest token of each file) is kept with the file's
size and modification time, so that a restart does not read them again.

- `VerdictCache`: the verdicts, in one JSON file.
- `validate_source`: checks a source.
"""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import HEADER_BYTES, Index, read_index
from megatron_hybrid.data.sources import Shard, TokenSource

_CHUNK_BYTES = 16 << 20
_INDEX_CHUNK = 1 << 20
_THREADS = 8

logger = logging.getLogger(__name__)


class VerdictCache:
    """What was found in files that have not changed since: `FOLDER/validated_data.json`.

    A cache that cannot be read is as if it were not there.
    """

    def __init__(self, folder: str | Path | None):
        """In a folder; None: remembers nothing."""
        self._file = None if folder is None else Path(folder) / "validated_data.json"
        self._verdicts = self._load()

    def _load(self) -> dict[str, Any]:
        if self._file is None:
            return {}
        try:
            verdicts = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return verdicts if isinstance(verdicts, dict) else {}

    def get(self, path: str, read_as: str) -> int | None:
        """The largest token found in a file read as this type; None: unknown, or the file has changed."""
        found = self._verdicts.get(os.path.abspath(path))
        if not isinstance(found, dict) or found.get("is") != _identity(path, read_as):
            return None
        max_token = found.get("max_token")
        return max_token if isinstance(max_token, int) else None

    def put(self, verdicts: dict[tuple[str, str], int]) -> None:
        """Remember the largest token by (path, read as), beside what other processes have put there meanwhile."""
        self._verdicts = self._load() | self._verdicts
        for (path, read_as), max_token in verdicts.items():
            self._verdicts[os.path.abspath(path)] = {"is": _identity(path, read_as), "max_token": max_token}
        if self._file is None or not verdicts:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(self._verdicts, indent=1), encoding="utf-8")
        os.replace(partial, self._file)


def _identity(path: str, read_as: str) -> list[int | str]:
    """What changes when a file does."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, read_as]


def validate_source(source: TokenSource, vocab_size: int, cache: VerdictCache | None = None) -> None:
    """Check a source's indexes and that every token is below vocab_size.

    Raises:
        DataError: naming the file and the byte offset of the first entry or token that is wrong.
    """
    cache = cache or VerdictCache(None)
    for shard in source.shards:
        if shard.index_path is not None and cache.get(shard.index_path, "index") is None:
            check_index(read_index(shard.index_path))
            cache.put({(shard.index_path, "index"): 0})
    to_scan = []
    for shard in source.shards:
        if shard.dtype.kind == "u" and np.iinfo(shard.dtype).max < vocab_size:
            continue  # the type cannot hold a token that is too large
        known = cache.get(shard.path, _read_as(shard))
        if known is None or known >= vocab_size:
            to_scan.append(shard)
    if not to_scan:
        return
    total = sum(shard.num_tokens * shard.dtype.itemsize for shard in to_scan)
    logger.info(
        "%s: checking %d file(s), %.1f GB, for tokens beyond the vocabulary", source.name, len(to_scan), total / 1e9
    )
    verdicts: dict[tuple[str, str], int] = {}
    with ThreadPoolExecutor(min(_THREADS, len(to_scan), os.cpu_count() or 1)) as pool:
        scans = [pool.submit(scan, shard, vocab_size) for shard in to_scan]
        try:
            for shard, result in zip(to_scan, scans, strict=True):
                verdicts[shard.path, _read_as(shard)] = result.result()
        finally:
            for result in scans:
                result.cancel()
            cache.put(verdicts)  # also those before a bad file: the next try starts there


def _read_as(shard: Shard) -> str:
    return f"{shard.dtype.str}+{shard.offset}"


def scan(shard: Shard, vocab_size: int) -> int:
    """The largest token of a shard.

    Raises:
        DataError: a token outside [0, vocab_size), the first one.
    """
    tokens = shard.map()
    step = _CHUNK_BYTES // shard.dtype.itemsize
    largest = 0
    for start in range(0, len(tokens), step):
        chunk = tokens[start : start + step]
        top = int(chunk.max())
        if top >= vocab_size or (shard.dtype.kind == "i" and int(chunk.min()) < 0):
            bad = (chunk < 0) | (chunk >= vocab_size) if shard.dtype.kind == "i" else chunk >= vocab_size
            first = start + int(np.argmax(bad))
            raise DataError(
                f"{shard.path}: byte {shard.byte_offset(first)}: token {int(tokens[first])} (number {first}, "
                f"{shard.dtype.name}) is outside the vocabulary of "
                f"{vocab_size}: made with another tokenizer, or not of this type"
            )
        largest = max(largest, top)
    return largest


def check_index(index: Index) -> None:
    """Check every entry of an index: sequences lie one after the other, documents begin at sequences, in order.

    Raises:
        DataError: naming the byte of the first entry that is wrong.
    """
    n, itemsize = len(index.lengths), index.dtype.itemsize
    pointer = 0
    for start in range(0, n, _INDEX_CHUNK):
        lengths = index.lengths[start : start + _INDEX_CHUNK]
        _first_bad(index, lengths < 0, lengths, start, HEADER_BYTES, 4, "sequence length {} is negative")
        ends = pointer + np.cumsum(lengths, dtype=np.int64) * itemsize
        expected = np.concatenate([[pointer], ends[:-1]])
        pointers = index.pointers[start : start + _INDEX_CHUNK]
        what = "sequence pointer {} is not where the sequence before ends"
        _first_bad(index, pointers != expected, pointers, start, HEADER_BYTES + 4 * n, 8, what)
        pointer = int(ends[-1])
    base, m = HEADER_BYTES + 12 * n, len(index.document_indices)
    if m < 2 or index.document_indices[0] != 0 or index.document_indices[-1] != n:
        raise DataError(f"{index.path}: byte {base}: document indices do not go from sequence 0 to {n}")
    before = 0
    for start in range(0, m, _INDEX_CHUNK):
        documents = index.document_indices[start : start + _INDEX_CHUNK]
        falls = np.diff(documents, prepend=before) < 0
        _first_bad(
            index, falls | (documents > n), documents, start, base, 8, "document index {} is out of order or range"
        )
        before = documents[-1]


def _first_bad(
    index: Index, bad: np.ndarray, values: np.ndarray, start: int, base: int, itemsize: int, what: str
) -> None:
    if bad.any():
        first = int(np.argmax(bad))
        raise DataError(f"{index.path}: byte {base + (start + first) * itemsize}: {what.format(int(values[first]))}")
