"""Tokenize documents, in this process or in a pool of workers.

- `Encoder`: tokenizes a batch.
- `encode_all`: tokenizes batches in their order, at most `2 * workers` at a time.
"""

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np

from megatron_hybrid.data.documents import Batch, parse_batch
from megatron_hybrid.data.errors import BadRecord, DataError
from megatron_hybrid.data.indexed import smallest_dtype
from megatron_hybrid.data.records import ReadOptions
from megatron_hybrid.data.tokenizer import Tokenizer

_MAX_DOCUMENT = (1 << 31) - 1  # an .idx has int32 lengths


class Tokens(NamedTuple):
    """Tokenized batch."""

    tokens: np.ndarray
    """[sum(lengths)]"""
    lengths: np.ndarray
    """int64 [documents]; 0: left out."""
    empty: int
    skipped: list[str]
    """Kind of each bad record that was left out."""
    consumed: int


class Encoder:
    """Encoder of batches. Each worker has one."""

    def __init__(self, tokenizer: Tokenizer, options: ReadOptions, append_eos: bool):
        self.tokenizer, self.options, self.append_eos = tokenizer, options, append_eos
        self.dtype = smallest_dtype(tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> Tokens:
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        skipped: list[str] = []
        empty = 0
        for where, text in parse_batch(batch, self.options, skipped):
            ids = self.tokenizer.encode(text) if text else []
            empty += text is not None and not ids
            if ids and self.append_eos:
                ids.append(self.tokenizer.eos_token_id)
            if len(ids) > _MAX_DOCUMENT:
                ids = self._leave_out(where, len(ids), skipped)
            parts.append(np.array(ids, dtype=self.dtype))
            lengths.append(len(ids))
        tokens = np.concatenate(parts) if parts else np.empty(0, self.dtype)
        return Tokens(tokens, np.array(lengths, dtype=np.int64), empty, skipped, batch.consumed)

    def _leave_out(self, where: str, length: int, skipped: list[str]) -> list[int]:
        if not self.options.skips("too_long"):
            raise BadRecord(f"{where}: {length} tokens; a document has at most {_MAX_DOCUMENT}: cut it", "too_long")
        skipped.append("too_long")
        return []


_encoder: Encoder  # of this worker process


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder


def _encode_in_worker(batch: Batch) -> Tokens:
    return _encoder(batch)


def encode_all(batches: Iterator[Batch], encoder: Encoder, workers: int) -> Generator[Tokens]:
    """Yield tokenized batches, in the order of the batches."""
    if workers == 1:
        yield from map(encoder, batches)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(encoder,))
    waiting: deque[Future[Tokens]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, most likely for lack of memory: use fewer --workers, or shorter documents"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
