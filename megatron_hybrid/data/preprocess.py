"""Tokenize documents to `.bin/.idx` files that megatron-core reads, and a JSON summary.

The main process cuts the input into batches and writes. Workers read, parse and tokenize. Batches are written in the
order of the input, so the output does not depend on the number of workers. At most `2 * workers` batches are in
memory, so memory does not depend on the size of the input (a single document must fit).
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_hybrid.data.documents import find_files, iterate_batches
from megatron_hybrid.data.encode import Encoder, Tokens, encode_all
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import IndexedWriter
from megatron_hybrid.data.outputs import Outputs, refuse_outputs
from megatron_hybrid.data.permutation import hash_integers
from megatron_hybrid.data.records import ReadOptions, Skipped
from megatron_hybrid.data.tokenizer import load_tokenizer, vocabulary_sha256


@dataclass(frozen=True)
class Summary:
    """Content of `PREFIX.json`. This tool recognizes its datasets by the first five fields (`outputs`)."""

    documents: int
    tokens: int
    """Number of tokens, end-of-document tokens included."""
    max_token: int
    dtype: str
    tokenizer: str
    vocab_size: int
    eos_token_id: int
    append_eos: bool
    empty_documents: int
    """Number of documents without text, which are left out, of the whole input."""
    skipped_documents: int
    """Number of bad records of the whole input that --bad-records and --bad-utf8 leave out."""
    skipped_by_kind: dict[str, int]
    """Bad records by kind, such as `not_json`."""
    skipped_files: dict[str, int]
    """Number of files, folders and links of the whole input that were not read, by kind."""
    inputs: list[str]
    sha256: str | None
    """Hash of the .bin, if requested."""
    vocabulary_sha256: str
    """Hash of the tokenizer's ids and their text, which other tools compare with their tokenizer's."""


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
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Summary]:
    """Tokenize the documents of the inputs into `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`.

    Args:
        inputs, include, exclude, kind: as `find_files` takes them.
        tokenizer: as `load_tokenizer` takes it.
        options: how records are read, and whether bad ones are left out.
        split: share by name; the documents of each go to `PREFIX_NAME`, chosen by a hash of the document's index.
        append_eos: end every document with the end-of-document token.
        workers: processes that tokenize; 1: this one.
        sha256: hash the tokens into the summary.
        overwrite: replace datasets that this tool wrote. Nothing else is ever replaced.
        progress: receives the bytes read and the bytes in total, after each batch.
        say: receives a sentence about the work folder of a dead process.

    Returns:
        The summary of each prefix written.

    Raises:
        DataError: input that is missing, empty, broken or not UTF-8; a split without documents; an output that exists,
            or that another process is writing. All datasets are as they were before.
        ValueError: a split that does not add up to 1, or workers below 1.
    """
    if workers < 1:
        raise ValueError(f"workers = {workers}: at least 1")
    options, skipped = options or ReadOptions(), Skipped()
    prefixes = _split_prefixes(_check_prefix(prefix), split)
    encoder = Encoder(load_tokenizer(tokenizer), options, append_eos)
    files = find_files(inputs, include, exclude, kind, options, skipped)
    refuse_outputs(prefixes, overwrite, {file.identity for file in files})
    total = sum(file.size for file in files)
    upper = np.cumsum(list((split or {"": 1.0}).values()))
    documents = empty = 0
    with Outputs(prefixes, overwrite, say) as outputs, ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(outputs.working_prefix(out), encoder.dtype, sha256)) for out in prefixes
        ]
        results = encode_all(iterate_batches(files, options, skipped), encoder, workers)
        stack.callback(results.close)
        for result in results:
            _write(result, documents, upper, writers)
            documents += len(result.lengths)
            empty += result.empty
            skipped.update(result.skipped)
            progress(result.consumed, total)
        _check_not_empty(dict(zip(prefixes, writers)), documents, inputs)
        summaries, vocabulary = {}, vocabulary_sha256(encoder.tokenizer)
        for out, writer in zip(prefixes, writers):
            summaries[out] = Summary(
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                max_token=writer.max_token,
                dtype=encoder.dtype.name,
                tokenizer=tokenizer,
                vocab_size=encoder.tokenizer.vocab_size,
                eos_token_id=encoder.tokenizer.eos_token_id,
                append_eos=append_eos,
                empty_documents=empty,
                skipped_documents=skipped.documents.total(),
                skipped_by_kind=dict(sorted(skipped.documents.items())),
                skipped_files=dict(sorted(skipped.files.items())),
                inputs=[str(input_) for input_ in inputs],
                sha256=writer.sha256,
                vocabulary_sha256=vocabulary,
            )
            writer.finish()
            _write_summary(outputs.working_prefix(out), summaries[out])
        outputs.publish()
    return summaries


def _check_prefix(prefix: str | Path) -> str:
    name = os.path.basename(str(prefix))
    if name in ("", ".", ".."):
        raise DataError(f"output prefix {str(prefix)!r} is a folder: add the name of the dataset, such as data/corpus")
    return str(prefix)


def _split_prefixes(prefix: str, split: dict[str, float] | None) -> list[str]:
    if split is None:
        return [prefix]
    if not all(share > 0 for share in split.values()) or not math.isclose(sum(split.values()), 1, abs_tol=1e-6):
        raise ValueError(f"split {','.join(map(str, split.values()))}: shares must be positive and add up to 1")
    for name in split:
        if not name or "/" in name:
            raise ValueError(f"split name {name!r}: a plain name is needed, such as train")
    return [f"{prefix}_{name}" for name in split]


def _write(result: Tokens, first: int, upper: np.ndarray, writers: list[IndexedWriter]) -> None:
    """Write each document of a batch to its split. first: index of the first document."""
    kept = result.lengths > 0
    if len(writers) == 1:
        writers[0].add(result.tokens, result.lengths[kept])
        return
    uniform = np.array([hash_integers(first + i) / 2**64 for i in range(len(result.lengths))])
    chosen = np.minimum(np.searchsorted(upper, uniform, side="right"), len(writers) - 1)
    for i, writer in enumerate(writers):
        mine = chosen == i
        writer.add(result.tokens[np.repeat(mine, result.lengths)], result.lengths[mine & kept])


def _check_not_empty(writers: dict[str, IndexedWriter], documents: int, inputs: Sequence[str | Path]) -> None:
    if not any(writer.num_documents for writer in writers.values()):
        raise DataError(f"{', '.join(map(str, inputs))}: {documents} documents, and no text in them")
    for prefix, writer in writers.items():
        if not writer.num_documents:
            raise DataError(f"{prefix}: none of {documents} documents fell to it: give it a larger share of --split")


def _write_summary(prefix: str, summary: Summary) -> None:
    with open(f"{prefix}.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(summary), indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def describe_skipped(summary: Summary) -> str:
    """Return a line that reports omitted documents and files, or empty text."""
    parts = []
    for what, kinds in (("records", summary.skipped_by_kind), ("files or links", summary.skipped_files)):
        if kinds:
            listed = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
            parts.append(f"{sum(kinds.values())} {what} ({listed})")
    return f"left out: {'; '.join(parts)}\n" if parts else ""


def parse_split(shares: str | None, names: str) -> dict[str, float] | None:
    """Parse `0.99,0.01` and `train,validation` to shares by name. Raises ValueError."""
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
