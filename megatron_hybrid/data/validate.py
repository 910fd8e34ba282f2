"""Check of tokens and indexes before training starts.

The work is cut into pieces of a file, which the processes of a run share (`Team`). The verdict on each piece is kept, so
that a check that was killed continues where it was, and a restart does not read the files again (data/verdicts.py).
Nothing here waits for another process.

- `check_sources`: checks all sources of a run, completely or by samples.
- `validate_source`: checks one source completely.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import HEADER_BYTES, Index, read_index
from megatron_hybrid.data.permutation import hash_integers
from megatron_hybrid.data.raw_tokens import PROBE_BYTES, contradiction
from megatron_hybrid.data.sources import Shard, TokenSource, check_tokens
from megatron_hybrid.data.verdicts import VerdictCache

Mode = Literal["full", "sample"]
FULL_BELOW_BYTES = 100 * 10**9
"""`data.check: auto` reads all tokens below this total size, which takes about a minute at 2 GB/s."""
PIECE_BYTES = 256 << 20
"""Bytes per piece of a complete check."""
SAMPLED_PIECE_BYTES = 64 << 30
"""Bytes per piece of a check by samples."""
SAMPLE_EVERY_BYTES, SAMPLE_BYTES = 128 << 20, 256 << 10
"""A sample of a file: windows of SAMPLE_BYTES, one at a random place of every SAMPLE_EVERY_BYTES, one at each end."""
_CHUNK_BYTES = 16 << 20
_INDEX_CHUNK = 1 << 20
_THREADS = 8


class Team(Protocol):
    """Processes that share a check."""

    def claim(self, work: str, count: int) -> Iterator[int]:
        """Yield the numbers below `count` that this process is to work on, until all are taken or a process has failed.

        Each number goes to one of the processes that ask for the same work.
        """
        ...


class Alone:
    """Team of one process."""

    def claim(self, work: str, count: int) -> Iterator[int]:
        """Yield every number below `count`."""
        return iter(range(count))


@dataclass(frozen=True)
class Piece:
    """Piece of work: tokens [start, stop) of a shard, or its index."""

    shard: Shard
    start: int
    stop: int
    kind: Literal["full", "sample", "index"]

    @property
    def path(self) -> str:
        """Path of the file."""
        return self.shard.path if self.kind != "index" else str(self.shard.index_path)

    @property
    def read_as(self) -> str:
        """Type that the file is read as."""
        return f"{self.shard.dtype.str}+{self.shard.offset}" if self.kind != "index" else "index"

    @property
    def key(self) -> str:
        """Name of the piece within its file."""
        return f"{self.kind}:{self.start}-{self.stop}"

    @property
    def is_whole(self) -> bool:
        """True if the piece is the whole file."""
        return self.kind == "index" or (self.start, self.stop) == (0, self.shard.num_tokens)

    def check(self, vocab_size: int) -> int:
        """Return the largest token. Raises DataError as `check_sources` does."""
        if self.kind == "index":
            check_index(read_index(self.path))
            return 0
        if self.kind == "full":
            return scan(self.shard, vocab_size, self.start, self.stop)
        return max(
            scan(self.shard, vocab_size, *window) for window in sample_windows(self.shard, self.start, self.stop)
        )


def validate_source(source: TokenSource, vocab_size: int, cache: VerdictCache | None = None) -> None:
    """Check a source's indexes and that every token is below vocab_size.

    Raises:
        DataError: naming the file and the byte offset of the first entry or token that is wrong.
    """
    check_sources([source], vocab_size, "full", cache)


def choose_mode(check: Literal["auto", "full", "sample", "none"], sources: Sequence[TokenSource]) -> Mode | None:
    """Return the mode of a check for a value of `data.check`. None: no check."""
    if check != "auto":
        return None if check == "none" else check
    return "full" if sum(shard.nbytes for shard in _shards(sources)) < FULL_BELOW_BYTES else "sample"


def check_sources(
    sources: Sequence[TokenSource],
    vocab_size: int,
    mode: Mode,
    cache: VerdictCache | None = None,
    team: Team | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Check this process's share of the indexes and tokens of all sources.

    Args:
        cache: verdicts of earlier checks, which are not repeated; new ones are added.
        team: the processes that share the work; None: this one alone. All of it is checked when all of them have returned.
        report: told the pieces that the team has begun or done, and how many there are.

    Raises:
        DataError: naming the file and the byte offset of an entry or token that is wrong, or tokens of another type.
    """
    cache, team = cache or VerdictCache(None), team or Alone()
    pieces = [piece for shard in _shards(sources) for piece in cut(shard, mode, vocab_size)]
    running: deque[tuple[Piece, Future[int]]] = deque()
    threads = max(1, min(_THREADS, len(pieces), os.cpu_count() or 1))
    with ThreadPoolExecutor(threads) as pool:
        try:
            for number in team.claim(_name(pieces, vocab_size), len(pieces)):
                piece = pieces[number]
                if not _is_known(cache, piece, vocab_size):
                    running.append((piece, pool.submit(piece.check, vocab_size)))
                while len(running) > threads:  # another process cannot take queued pieces
                    _settle(cache, *running.popleft())
                report(number, len(pieces))
            while running:
                _settle(cache, *running.popleft())
        finally:
            for piece, future in running:
                if not future.cancel() and future.exception() is None:
                    _remember(cache, piece, future.result())
            cache.save()  # also those before a bad file: the next attempt starts there
    _complete(cache, pieces)


def _shards(sources: Sequence[TokenSource]) -> list[Shard]:
    """Return the shards of all sources, each once."""
    return list(dict.fromkeys(shard for source in sources for shard in source.shards))


def cut(shard: Shard, mode: Mode, vocab_size: int) -> list[Piece]:
    """Cut the work on a shard into pieces."""
    pieces = [Piece(shard, 0, 0, "index")] if shard.index_path is not None else []
    if not shard.can_exceed(vocab_size):
        return pieces
    step = (PIECE_BYTES if mode == "full" else SAMPLED_PIECE_BYTES) // shard.dtype.itemsize
    ends = [*range(step, shard.num_tokens, step), shard.num_tokens]
    return [*pieces, *(Piece(shard, start, stop, mode) for start, stop in zip([0, *ends], ends, strict=False))]


def sample_windows(shard: Shard, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the windows [first, last) of a piece that a check by samples reads, the same ones every time."""
    every, length = SAMPLE_EVERY_BYTES // shard.dtype.itemsize, SAMPLE_BYTES // shard.dtype.itemsize
    if start == 0:
        yield 0, min(length, stop)
    for first in range(start, stop, every):
        room = min(every, stop - first) - length
        if room > 0:
            place = first + hash_integers(shard.num_tokens, first) % room // 2 * 2  # even: pairs are probed
            yield place, place + length
    if stop == shard.num_tokens:
        yield max(0, stop - length) // 2 * 2, stop


def _name(pieces: Sequence[Piece], vocab_size: int) -> str:
    """Return a name of the work that is equal on processes with the same files.

    The inode distinguishes copies of a file on local disks of several nodes; each node checks its copy.
    """
    digest = hashlib.blake2b(str(vocab_size).encode(), digest_size=16)
    for piece in pieces:
        try:
            stat = os.stat(piece.path)
        except OSError as error:
            raise DataError(f"{piece.path}: cannot be read: {error.strerror}") from error
        told = (os.path.abspath(piece.path), stat.st_size, stat.st_mtime_ns, stat.st_ino, piece.read_as, piece.key)
        digest.update(repr(told).encode())
    return digest.hexdigest()


def _is_known(cache: VerdictCache, piece: Piece, vocab_size: int) -> bool:
    top = cache.get(piece.path, piece.read_as, sampled=piece.kind == "sample")
    if top is None:
        top = cache.get_piece(piece.path, piece.read_as, piece.key)
    return top is not None and 0 <= top < vocab_size and not _above_stated(piece, top)


def _settle(cache: VerdictCache, piece: Piece, future: "Future[int]") -> None:
    """Wait for the verdict on a piece and keep it."""
    top = future.result()
    if _above_stated(piece, top):
        raise DataError(
            f"{piece.path}: token {top} is larger than all tokens that its summary (.json) knows of, at most "
            f"{piece.shard.max_token}: the .bin has been replaced since. Write or copy all three files again"
        )
    _remember(cache, piece, top)
    cache.save(at_once=False)


def _above_stated(piece: Piece, top: int) -> bool:
    return piece.kind != "index" and piece.shard.max_token is not None and top > piece.shard.max_token


def _remember(cache: VerdictCache, piece: Piece, top: int) -> None:
    if piece.is_whole:
        cache.put(piece.path, piece.read_as, top, sampled=piece.kind == "sample")
    else:
        cache.put_piece(piece.path, piece.read_as, piece.key, top)


def _complete(cache: VerdictCache, pieces: Sequence[Piece]) -> None:
    """Replace the verdicts on all pieces of a file by one on the file."""
    files: dict[tuple[str, str], list[Piece]] = {}
    for piece in pieces:
        if not piece.is_whole:
            files.setdefault((piece.path, piece.read_as), []).append(piece)
    for (path, read_as), parts in files.items():
        sampled = parts[0].kind == "sample"
        if cache.get(path, read_as, sampled) is not None:
            continue
        tops = [cache.get_piece(path, read_as, part.key) for part in parts]
        known = [top for top in tops if top is not None]
        if len(known) == len(parts):
            cache.put(path, read_as, max(known), sampled)
    cache.save()


def scan(shard: Shard, vocab_size: int, start: int = 0, stop: int | None = None) -> int:
    """Return the largest of a shard's tokens [start, stop).

    Raises:
        DataError: a token outside [0, vocab_size), the first one, or tokens that are of another type.
    """
    tokens, stop = shard.tokens(), shard.num_tokens if stop is None else stop
    step = _CHUNK_BYTES // shard.dtype.itemsize
    largest = 0
    for first in range(start, stop, step):
        chunk = tokens[first : min(first + step, stop)]
        if problem := contradiction(chunk[: PROBE_BYTES // shard.dtype.itemsize], vocab_size):
            raise DataError(f"{shard.path}: byte {shard.byte_offset(first)}: {problem}")
        largest = max(largest, check_tokens(shard, chunk, first, vocab_size))
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
