"""Token streams on disk: a megatron-core prefix, or raw numpy shards (data/raw_tokens.py).

- `TokenSource`: a stream of tokens, the concatenation of a source's files. Every token is checked when it is read.
- `open_source`: opens a `SourceConfig` with the checks that read little; `validate` reads the tokens themselves.
"""

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from glob import glob

import numpy as np

from megatron_hybrid.base.lfs import refuse_lfs_pointer
from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.file_array import FileArray, OpenFile
from megatron_hybrid.data.indexed import Index, read_index
from megatron_hybrid.data.raw_tokens import fitting_types, raw_dtype
from megatron_hybrid.data.summary import StatedData, read_summary

_MOST_OPEN = 256  # files of a source: a process may have 1,024, and a source has thousands


@dataclass(frozen=True)
class Shard:
    """File of tokens."""

    path: str
    dtype: np.dtype
    offset: int
    """Bytes before the first token."""
    num_tokens: int
    index_path: str | None = None
    """Index of a megatron-core dataset."""
    max_token: int | None = None
    """Largest token by the summary of a megatron-core dataset."""

    @property
    def nbytes(self) -> int:
        """Size of the tokens in bytes."""
        return self.num_tokens * self.dtype.itemsize

    def tokens(self) -> FileArray:
        """Open the tokens: [num_tokens] of dtype. Raises DataError if the file cannot be opened."""
        return FileArray(self.path, self.dtype, self.offset, self.num_tokens)

    def byte_offset(self, token: int) -> int:
        """Return the byte offset of a token in the file."""
        return self.offset + token * self.dtype.itemsize

    def can_exceed(self, vocab_size: int) -> bool:
        """Return True if the type can hold a token outside [0, vocab_size)."""
        return self.dtype.kind != "u" or int(np.iinfo(self.dtype).max) >= vocab_size


class TokenSource:
    """Concatenated tokens of a source's files. Reading is thread-safe."""

    def __init__(self, name: str, shards: list[Shard], vocab_size: int):
        """Create a stream of at least one shard. name: name in messages."""
        self.name = name
        self.shards = tuple(shards)
        self.vocab_size = vocab_size
        self._ends = np.cumsum([shard.num_tokens for shard in shards])
        self.num_tokens = int(self._ends[-1])
        self._open: OrderedDict[int, OpenFile] = OrderedDict()  # by shard, the least recently used first
        self._lock = threading.Lock()

    def read(self, start: int, length: int) -> np.ndarray:
        """Return tokens [start, start + length): int64 [length].

        Raises:
            IndexError: outside the stream.
            DataError: a token outside the vocabulary, or a file that cannot be read or has become shorter.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"{self.name}: tokens [{start}, {start + length}) of {self.num_tokens}")
        out = np.empty(length, dtype=np.int64)
        shard, done = self.shard_of(start), 0
        while done < length:
            begin = start + done - self.shard_start(shard)
            part = self._read_shard(shard, begin, min(length - done, self.shards[shard].num_tokens - begin))
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    def shard_of(self, token: int) -> int:
        """Return the number of the shard that holds a token of the stream."""
        return int(np.searchsorted(self._ends, token, side="right"))

    def shard_start(self, shard: int) -> int:
        """Return the position in the stream at which a shard begins."""
        return int(self._ends[shard - 1]) if shard else 0

    def _read_shard(self, number: int, begin: int, count: int) -> np.ndarray:
        shard = self.shards[number]
        try:
            file = self._file(number)
        except OSError as error:
            raise DataError(f"{shard.path}: cannot be read: {error.strerror}") from error
        data = file.read(shard.byte_offset(begin), count * shard.dtype.itemsize)
        tokens = np.frombuffer(data, shard.dtype)
        check_tokens(shard, tokens, begin, self.vocab_size)
        return tokens

    def _file(self, number: int) -> OpenFile:
        with self._lock:
            if number not in self._open:
                self._open[number] = OpenFile(self.shards[number].path)
                if len(self._open) > _MOST_OPEN:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]


def check_tokens(shard: Shard, tokens: np.ndarray, first: int, vocab_size: int) -> int:
    """Return the largest of a shard's tokens [first, first + len(tokens)).

    Raises:
        DataError: a token outside [0, vocab_size): names the file, the byte and the first such token.
    """
    if not len(tokens):
        return 0
    top = int(tokens.max())
    if top < vocab_size and (shard.dtype.kind == "u" or int(tokens.min()) >= 0):
        return top
    bad = (tokens < 0) | (tokens >= vocab_size) if shard.dtype.kind == "i" else tokens >= vocab_size
    at = int(np.argmax(bad))
    hint = ""
    if shard.index_path is None and (types := fitting_types(tokens[at // 2 * 2 :], vocab_size)):
        hint = f". Read as {' or '.join(types)}, these bytes are inside it: is the source's dtype right?"
    raise DataError(
        f"{shard.path}: byte {shard.byte_offset(first + at)}: token {int(tokens[at])} (number {first + at}, "
        f"{shard.dtype.name}) is outside the vocabulary of "
        f"{vocab_size}: made with another tokenizer, or not of this type{hint}"
    )


def open_source(config: SourceConfig, vocab_size: int) -> TokenSource:
    """Open the token stream of a source.

    A path that ends in .npy, and every file of a glob, is a raw shard; a glob's shards are sorted by name. All else
    is a megatron-core prefix.

    Raises:
        DataError: missing, empty or truncated files, a bad index or header, or metadata that contradicts the files.
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
        return TokenSource(path, [_open_raw(file, config.dtype, vocab_size) for file in files], vocab_size)
    if path.endswith(".npy"):
        return TokenSource(path, [_open_raw(path, config.dtype, vocab_size)], vocab_size)
    return TokenSource(path, [_open_indexed(path)], vocab_size)


def _open_raw(path: str, dtype_name: str | None, vocab_size: int) -> Shard:
    refuse_lfs_pointer(path, DataError)
    dtype, offset, count = raw_dtype(path, dtype_name, vocab_size)
    return Shard(path, dtype, offset, count)


def _open_indexed(prefix: str) -> Shard:
    bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
    for file in (idx_path, bin_path):
        if not os.path.isfile(file):
            raise DataError(
                f"{file}: no such file. A source is a prefix (PREFIX.bin and PREFIX.idx, as of "
                "megatron-hybrid preprocess), a .npy shard, or a glob of such shards"
            )
    refuse_lfs_pointer(bin_path, DataError)
    try:
        index, size = read_index(idx_path), os.path.getsize(bin_path)
    except OSError as error:
        raise DataError(f"{error.filename or idx_path}: cannot be read: {error.strerror}") from error
    if size < index.end:
        raise DataError(
            f"{bin_path}: truncated at byte {size}: {idx_path} has {index.end} bytes. Write or copy both again"
        )
    if size > index.end:
        raise DataError(
            f"{bin_path}: bytes left over after byte {index.end}, at which the data ends by {idx_path}: is it of another dataset?"
        )
    if size == 0 or size % index.dtype.itemsize:
        raise DataError(f"{bin_path}: {size} bytes are no whole, positive number of {index.dtype.name} tokens")
    shard = Shard(bin_path, index.dtype, 0, size // index.dtype.itemsize, idx_path)
    stated = read_summary(prefix)
    if stated is None:
        return shard
    _compare(shard, index, stated)
    return Shard(bin_path, index.dtype, 0, shard.num_tokens, idx_path, stated.max_token)


def _compare(shard: Shard, index: Index, stated: StatedData) -> None:
    """Compare an index with the summary that was written with it."""
    found = {
        "dtype": index.dtype.name,
        "tokens": shard.num_tokens,
        "documents": max(len(index.document_indices) - 1, 0),
    }
    for field, value in found.items():
        if getattr(stated, field) != value:
            raise DataError(
                f"{stated.path}: {field} is {getattr(stated, field)}, but {index.path} has {value}: the files are of different "
                "datasets. Write or copy all three again; if only the summary is out of date, remove it"
            )
