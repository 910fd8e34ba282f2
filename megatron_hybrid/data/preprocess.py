"""Documents to tokens on disk: `.bin/.idx` that megatron-core reads, and a JSON summary beside them.

The main process cuts the input into batches and writes; workers read, parse and tokenize. Batches are written in the
order of the input whatever worker was first, so the output does not depend on the number of workers, and at most `2 *
workers` batches are under way, so memory does not depend on the input (a single document must fit).
"""

import json
import math
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megatron_hybrid.data.documents import Batch, ReadOptions, find_files, iterate_batches, parse_batch
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import IndexedWriter, smallest_dtype
from megatron_hybrid.data.permutation import hash_integers
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer, vocabulary_sha256

_MAX_DOCUMENT = (1 << 31) - 1  # an .idx has int32 lengths


@dataclass(frozen=True)
class Summary:
    """What `PREFIX.json` says of `PREFIX.bin`."""

    documents: int
    tokens: int
    """End-of-document tokens included."""
    max_token: int
    dtype: str
    tokenizer: str
    vocab_size: int
    eos_token_id: int
    append_eos: bool
    empty_documents: int
    """Left out, of the whole input."""
    skipped_documents: int
    """Left out because they are not UTF-8, of the whole input."""
    inputs: list[str]
    sha256: str | None
    """Of the .bin, if asked for."""
    vocabulary_sha256: str
    """Of the tokenizer's ids and their text: other tools compare it with their tokenizer's."""


class _Tokens(NamedTuple):
    """A batch, tokenized."""

    tokens: np.ndarray
    """[sum(lengths)]"""
    lengths: np.ndarray
    """int64 [documents]; 0: left out."""
    empty: int
    skipped: int
    consumed: int


class _Encoder:
    """Tokenizes batches; one in each worker."""

    def __init__(self, tokenizer: Tokenizer, options: ReadOptions, append_eos: bool):
        self.tokenizer, self.options, self.append_eos = tokenizer, options, append_eos
        self.dtype = smallest_dtype(tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> _Tokens:
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        empty = skipped = 0
        for where, text in parse_batch(batch, self.options):
            ids = self.tokenizer.encode(text) if text else []
            empty += text is not None and not ids
            skipped += text is None
            if ids and self.append_eos:
                ids.append(self.tokenizer.eos_token_id)
            if len(ids) > _MAX_DOCUMENT:
                raise DataError(f"{where}: {len(ids)} tokens; a document has at most {_MAX_DOCUMENT}: cut it")
            parts.append(np.array(ids, dtype=self.dtype))
            lengths.append(len(ids))
        tokens = np.concatenate(parts) if parts else np.empty(0, self.dtype)
        return _Tokens(tokens, np.array(lengths, dtype=np.int64), empty, skipped, batch.consumed)


_encoder: _Encoder  # of this worker process


def _start_worker(spec: str, options: ReadOptions, append_eos: bool) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = _Encoder(load_tokenizer(spec), options, append_eos)


def _encode_in_worker(batch: Batch) -> _Tokens:
    return _encoder(batch)


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    *,
    tokenizer: str = "byte",
    options: ReadOptions | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kind: Literal["auto", "text", "jsonl"] = "auto",
    split: dict[str, float] | None = None,
    append_eos: bool = True,
    workers: int = 1,
    sha256: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda consumed, total: None,
) -> dict[str, Summary]:
    """Tokenize the documents of the inputs into `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`.

    Args:
        inputs, include, exclude, kind: as `find_files` takes them.
        tokenizer: as `load_tokenizer` takes it.
        split: share by name; the documents of each go to `PREFIX_NAME`, chosen by a hash of the document's index.
        append_eos: end every document with the end-of-document token.
        workers: processes that tokenize; 1: this one.
        sha256: hash the tokens into the summary.
        overwrite: replace an existing dataset.
        progress: told the bytes read and the bytes there are, after each batch.

    Returns:
        The summary of each prefix written.

    Raises:
        DataError: input that is missing, empty, broken or not UTF-8; a split without documents; an existing dataset.
            What stood under the final names before still does, and nothing else.
        ValueError: a split that does not add up to 1, or workers below 1.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: at least 1")
    prefixes = _split_prefixes(str(prefix), split)
    encoder = _Encoder(load_tokenizer(tokenizer), options or ReadOptions(), append_eos)
    files = find_files(inputs, include, exclude, kind)
    for out in prefixes:
        if not overwrite and (old := [out + end for end in (".bin", ".idx", ".json") if os.path.exists(out + end)]):
            raise DataError(f"{old[0]} exists: give another output prefix, or --overwrite")
    total = sum(file.size for file in files)
    upper = np.cumsum(list((split or {"": 1.0}).values()))
    documents = empty = skipped = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(out, encoder.dtype, sha256)) for out in prefixes]
        results = _encode_all(iterate_batches(files), encoder, tokenizer, workers)
        stack.callback(results.close)
        for result in results:
            _write(result, documents, upper, writers)
            documents += len(result.lengths)
            empty += result.empty
            skipped += result.skipped
            progress(result.consumed, total)
        _check_not_empty(writers, documents, inputs)
        summaries, vocabulary = {}, vocabulary_sha256(encoder.tokenizer)
        for writer in writers:
            summaries[writer.prefix] = Summary(
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                max_token=writer.max_token,
                dtype=encoder.dtype.name,
                tokenizer=tokenizer,
                vocab_size=encoder.tokenizer.vocab_size,
                eos_token_id=encoder.tokenizer.eos_token_id,
                append_eos=append_eos,
                empty_documents=empty,
                skipped_documents=skipped,
                inputs=[str(input_) for input_ in inputs],
                sha256=writer.sha256,
                vocabulary_sha256=vocabulary,
            )
            Path(f"{writer.prefix}.json").unlink(missing_ok=True)  # the old one's, before the new tokens
            writer.finish()
            _write_summary(writer.prefix, summaries[writer.prefix])
    return summaries


def _split_prefixes(prefix: str, split: dict[str, float] | None) -> list[str]:
    if split is None:
        return [prefix]
    if not all(share > 0 for share in split.values()) or not math.isclose(sum(split.values()), 1, abs_tol=1e-6):
        raise ValueError(f"split {','.join(map(str, split.values()))}: shares must be positive and add up to 1")
    return [f"{prefix}_{name}" for name in split]


def _encode_all(batches: Iterator[Batch], encoder: _Encoder, spec: str, workers: int) -> Generator[_Tokens]:
    """Tokenized batches, in the order of the batches."""
    if workers == 1:
        yield from map(encoder, batches)
        return
    start = (spec, encoder.options, encoder.append_eos)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=start)
    waiting: deque[Future[_Tokens]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, most likely for want of memory: use fewer --workers, or shorter documents"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _write(result: _Tokens, first: int, upper: np.ndarray, writers: list[IndexedWriter]) -> None:
    """Hand each document of a batch, the first of which has index `first`, to its split's writer."""
    kept = result.lengths > 0
    if len(writers) == 1:
        writers[0].add(result.tokens, result.lengths[kept])
        return
    uniform = np.array([hash_integers(first + i) / 2**64 for i in range(len(result.lengths))])
    chosen = np.minimum(np.searchsorted(upper, uniform, side="right"), len(writers) - 1)
    for i, writer in enumerate(writers):
        mine = chosen == i
        writer.add(result.tokens[np.repeat(mine, result.lengths)], result.lengths[mine & kept])


def _check_not_empty(writers: list[IndexedWriter], documents: int, inputs: Sequence[str | Path]) -> None:
    if not any(writer.num_documents for writer in writers):
        raise DataError(f"{', '.join(map(str, inputs))}: {documents} documents, and no text in them")
    for writer in writers:
        if not writer.num_documents:
            raise DataError(
                f"{writer.prefix}: none of {documents} documents fell to it: give it a larger share of --split"
            )


def _write_summary(prefix: str, summary: Summary) -> None:
    partial = Path(f"{prefix}.json.partial")
    partial.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, f"{prefix}.json")


def parse_split(shares: str | None, names: str) -> dict[str, float] | None:
    """`0.99,0.01` and `train,validation` to shares by name. Raises ValueError."""
    if shares is None:
        return None
    keys = names.split(",")
    try:
        values = [float(share) for share in shares.split(",")]
    except ValueError:
        raise ValueError(f"--split {shares}: numbers with commas between are needed, such as 0.99,0.01") from None
    if len(values) != len(keys) or len(set(keys)) != len(keys):
        raise ValueError(
            f"--split {shares}: {len(values)} shares for the names {names}: give --split-names, one a share"
        )
    return dict(zip(keys, values, strict=True))
