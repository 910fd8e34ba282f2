r"""megatron-core's indexed dataset: `PREFIX.bin` holds tokens, `PREFIX.idx` holds the offsets of sequences.

Layout of an .idx, little-endian (read off megatron-core 0.19.2, `core/datasets/indexed_dataset.py`):

    byte 0   9 bytes   b"MMIDIDX\0\0"
    byte 9   uint64    version, 1
    byte 17  uint8     code of the tokens' type
    byte 18  uint64    number of sequences, n
    byte 26  uint64    number of document indices, m (documents + 1)
    byte 34  int32[n]  tokens of each sequence
             int64[n]  byte offset of each sequence in the .bin
             int64[m]  sequence at which each document begins, and n
             int8[n]   mode of each sequence (multimodal data only)

- `read_index`: header and arrays of an .idx, with the checks that cost nothing.
- `IndexedWriter`: writes both files under temporary names and renames them when they are complete.
"""

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_hybrid.base.lfs import refuse_lfs_pointer
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.file_array import FileArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Integer types by code. 6 and 7 are float64 and float32, which cannot hold tokens."""


@dataclass(frozen=True)
class Index:
    """Content of an .idx."""

    path: Path
    dtype: np.dtype
    """Type of the .bin's tokens."""
    lengths: FileArray
    """int32 [n]: tokens of each sequence."""
    pointers: FileArray
    """int64 [n]: byte offset of each sequence in the .bin."""
    document_indices: FileArray
    """int64 [m]: first sequence of each document, and n."""

    @property
    def end(self) -> int:
        """Size of the .bin in bytes, by the last sequence."""
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize


def read_index(path: str | Path) -> Index:
    """Read header and arrays of an .idx.

    Raises:
        DataError: not an index, a type that holds no tokens, no sequences, or a size that the header contradicts.
    """
    path = Path(path)
    refuse_lfs_pointer(path, DataError)
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    if not header.startswith(MAGIC[: len(header)]) or not header:
        raise DataError(f"{path}: byte 0: {header[:9]!r} is not the magic {MAGIC!r} of an indexed dataset")
    if size < HEADER_BYTES:
        raise DataError(f"{path}: truncated at byte {size}, inside its header of {HEADER_BYTES} bytes")
    version, code, n, m = struct.unpack_from("<QBQQ", header, len(MAGIC))
    if version != VERSION:
        raise DataError(f"{path}: byte 9: version {version}; only version {VERSION} is known")
    if code not in DTYPES:
        raise DataError(f"{path}: byte 17: type code {code} is no integer type (known: {sorted(DTYPES)})")
    if n == 0:
        raise DataError(f"{path}: byte 18: no sequences; the dataset is empty")
    expected = HEADER_BYTES + 12 * n + 8 * m
    if size not in (expected, expected + n):  # the second with modes
        what = f"truncated at byte {size}" if size < expected else f"bytes left over after byte {expected}"
        raise DataError(f"{path}: {what}: {n} sequences and {m} document indices (bytes 18, 26) take {expected} bytes")
    dtype = np.dtype(DTYPES[code]).newbyteorder("<")
    lengths = FileArray(path, np.dtype("<i4"), HEADER_BYTES, n)
    pointers = FileArray(path, np.dtype("<i8"), HEADER_BYTES + 4 * n, n)
    return Index(path, dtype, lengths, pointers, FileArray(path, np.dtype("<i8"), HEADER_BYTES + 12 * n, m))


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Return the type of tokens in a .bin: uint16 if every id fits, otherwise int32 (the format has no uint32)."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<i4")


class IndexedWriter:
    """Writer of `PREFIX.bin` and `PREFIX.idx`. Files with these names are created by `finish`.

    As a context manager it discards what `finish` did not complete.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, sha256: bool = False):
        """Open `PREFIX.bin.partial`. sha256: also hash the tokens' bytes."""
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, type_ in DTYPES.items() if np.dtype(type_) == np.dtype(dtype))
        self._hash = hashlib.sha256() if sha256 else None
        self._lengths: list[np.ndarray] = []
        self.num_documents = 0
        self.num_tokens = 0
        self.max_token = -1
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._partial = {suffix: Path(f"{self.prefix}{suffix}.partial") for suffix in (".bin", ".idx")}
        self._bin = self._partial[".bin"].open("wb")

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: their tokens one after the other [sum(lengths)] and the tokens of each [documents]."""
        assert tokens.ndim == lengths.ndim == 1 and len(tokens) == int(lengths.sum())
        if len(lengths) == 0:
            return
        data = np.ascontiguousarray(tokens, dtype=self.dtype)
        self._bin.write(data.data)
        if self._hash is not None:
            self._hash.update(data.data)
        self._lengths.append(lengths.astype("<i4"))
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)
        if len(tokens):
            self.max_token = max(self.max_token, int(tokens.max()))

    @property
    def sha256(self) -> str | None:
        """Return the hexadecimal hash of the .bin so far, if it was requested."""
        return None if self._hash is None else self._hash.hexdigest()

    def finish(self) -> None:
        """Write the index and rename both files. An older .idx is removed first, so that it is never next to a newer .bin."""
        _sync_and_close(self._bin)
        with self._partial[".idx"].open("wb") as file:
            self._write_index(file)
            _sync_and_close(file)
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(self._partial[suffix], f"{self.prefix}{suffix}")

    def _write_index(self, file: BinaryIO) -> None:
        n = self.num_documents
        file.write(MAGIC + struct.pack("<QBQQ", VERSION, self._code, n, n + 1))
        for lengths in self._lengths:
            file.write(lengths.data)
        pointer = 0
        for lengths in self._lengths:
            ends = pointer + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            file.write(np.concatenate([[pointer], ends[:-1]]).astype("<i8").data)
            pointer = int(ends[-1])
        for start in range(0, n + 1, 1 << 20):
            file.write(np.arange(start, min(start + (1 << 20), n + 1), dtype="<i8").data)

    def discard(self) -> None:
        """Remove incomplete files. It has no effect after `finish`."""
        self._bin.close()
        for file in self._partial.values():
            file.unlink(missing_ok=True)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()


def _sync_and_close(file: BinaryIO) -> None:
    """Flush a file to disk, before it is renamed."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
