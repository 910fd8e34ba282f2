"""Token streams on disk: a megatron-core prefix, or raw numpy shards.

OLMo-core writes its `.npy` shards with `tofile`: plain uint16 or uint32 without NumPy's header. A file that does have
the header (`\\x93NUMPY`) is read by it.

- `TokenSource`: a stream of tokens, the concatenation of a source's files.
- `open_source`: of a `SourceConfig`, with the checks that cost nothing; `validate` reads every token.
"""

import os
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.config.lfs import refuse_lfs_pointer
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import read_index

_NUMPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    path: str
    dtype: np.dtype
    offset: int
    """Bytes before the first token."""
    num_tokens: int
    index_path: str | None = None
    """The .idx, of a megatron-core dataset."""

    def map(self) -> np.ndarray:
        """The tokens, memory-mapped: [num_tokens] of dtype."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.num_tokens,))

    def byte_offset(self, token: int) -> int:
        """Where a token lies in the file."""
        return self.offset + token * self.dtype.itemsize


class TokenSource:
    """The tokens of a source's files, one after the other. Reading is safe from several threads."""

    def __init__(self, name: str, shards: list[Shard]):
        """Of at least one shard; name: for messages."""
        self.name = name
        self.shards = tuple(shards)
        self._ends = np.cumsum([shard.num_tokens for shard in shards])
        self.num_tokens = int(self._ends[-1])
        self._maps: dict[int, np.ndarray] = {}  # filled at first use: there may be thousands of shards

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length): int64 [length].

        Raises:
            IndexError: outside the stream.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"{self.name}: tokens [{start}, {start + length}) of {self.num_tokens}")
        out = np.empty(length, dtype=np.int64)
        shard, done = int(np.searchsorted(self._ends, start, side="right")), 0
        while done < length:
            begin = start + done - (int(self._ends[shard - 1]) if shard else 0)
            part = self._map(shard)[begin : begin + length - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = self.shards[shard].map()
        return self._maps[shard]


def open_source(config: SourceConfig, vocab_size: int) -> TokenSource:
    """The token stream of a source.

    A path that ends in .npy, and every file of a glob, is a raw shard; a glob's shards are sorted by name. All else
    is a megatron-core prefix.

    Raises:
        DataError: missing, empty or truncated files, a bad index or header.
    """
    path = config.path
    if any(character in path for character in "*?[") and not os.path.exists(path):
        files = sorted(glob(path, recursive=True))
        if not files:
            raise DataError(f"{path}: no file matches")
        if others := [file for file in files if not file.endswith(".npy")]:
            raise DataError(
                f"{path}: matches {others[0]}, which is no .npy shard: narrow the pattern, such as to *.npy"
            )
        return TokenSource(path, [_open_raw(file, config.dtype, vocab_size) for file in files])
    if path.endswith(".npy"):
        return TokenSource(path, [_open_raw(path, config.dtype, vocab_size)])
    return TokenSource(path, [_open_indexed(path)])


def _open_indexed(prefix: str) -> Shard:
    bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
    for file in (idx_path, bin_path):
        if not os.path.isfile(file):
            raise DataError(
                f"{file}: no such file. A source is a prefix (PREFIX.bin and PREFIX.idx, as of "
                "tools/preprocess_data.py), a .npy shard, or a glob of such shards"
            )
    refuse_lfs_pointer(bin_path, DataError)
    index, size = read_index(idx_path), os.path.getsize(bin_path)
    if size < index.end:
        raise DataError(
            f"{bin_path}: truncated at byte {size}: {idx_path} says {index.end} bytes. Write or copy both again"
        )
    if size > index.end:
        raise DataError(
            f"{bin_path}: bytes left over after byte {index.end}, where {idx_path} says it ends: of another dataset?"
        )
    if size == 0 or size % index.dtype.itemsize:
        raise DataError(f"{bin_path}: {size} bytes are no whole, positive number of {index.dtype.name} tokens")
    return Shard(bin_path, index.dtype, 0, size // index.dtype.itemsize, idx_path)


def _open_raw(path: str, dtype_name: str | None, vocab_size: int) -> Shard:
    refuse_lfs_pointer(path, DataError)
    try:
        with open(path, "rb") as file:
            has_header = file.read(len(_NUMPY_MAGIC)) == _NUMPY_MAGIC
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if has_header:
        return _open_numpy(path, dtype_name)
    size = os.path.getsize(path)
    dtype = np.dtype(dtype_name or ("uint16" if vocab_size <= 1 << 16 else "uint32")).newbyteorder("<")
    if size == 0:
        raise DataError(f"{path}: empty")
    if left := size % dtype.itemsize:
        raise DataError(
            f"{path}: truncated at byte {size}: "
            f"{left} bytes of a {dtype.itemsize}-byte token follow byte {size - left} "
            f"(read as {dtype.name}: if that is wrong, give the source's dtype)"
        )
    return Shard(path, dtype, 0, size // dtype.itemsize)


def _open_numpy(path: str, dtype_name: str | None) -> Shard:
    """A shard with NumPy's header."""
    size = Path(path).stat().st_size
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            offset = file.tell()
    except (ValueError, SyntaxError, TypeError) as error:
        raise DataError(f"{path}: byte 0: bad NumPy header: {error}") from error
    if dtype.kind not in "ui" or len(shape) != 1:
        raise DataError(f"{path}: byte 0: NumPy header says {dtype} {list(shape)}; tokens are a flat array of integers")
    if dtype_name is not None and dtype.newbyteorder("=") != np.dtype(dtype_name):
        raise DataError(
            f"{path}: byte 0: NumPy header says {dtype.name}, the configuration {dtype_name}: leave dtype out"
        )
    end = offset + shape[0] * dtype.itemsize
    if shape[0] == 0:
        raise DataError(f"{path}: empty")
    if size != end:
        what = f"truncated at byte {size}" if size < end else f"bytes left over after byte {end}"
        raise DataError(f"{path}: {what}: its NumPy header says {shape[0]} tokens, {end} bytes")
    return Shard(path, dtype, offset, shape[0])
