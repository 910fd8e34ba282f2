"""Documents of files: text files, JSON lines, Parquet, folders of source code.

The main process finds files and cuts them into batches. A worker reads and parses a batch.

- `find_files`: the files of the inputs, in an order that depends on their names alone.
- `iterate_batches`: about 1 MiB of work at a time, so that memory does not grow with the input.
- `parse_batch`: a batch's documents.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_hybrid.data.compressed import InputStream, open_input
from megatron_hybrid.data.errors import BadRecord, DataError
from megatron_hybrid.data.formats import detect_format, has_text_name
from megatron_hybrid.data.outputs import FileId, file_id
from megatron_hybrid.data.parquet import iterate_rows
from megatron_hybrid.data.records import (
    ReadOptions,
    Skipped,
    is_blank,
    parse_line,
    parse_row,
    read_checked_text,
    read_text,
    refuse_large,
)
from megatron_hybrid.data.walk import FoundFile, Patterns, refuse_unmatched, walk

BATCH_BYTES = 1 << 20
BATCH_FILES = 256
_DEFAULTS = ReadOptions()

Content = Literal["text", "checked_text", "jsonl", "parquet"]
"""Format of a file. checked_text: text, unless its content has another format."""
Kind = Content | Literal["auto"]
_PARSE: dict[Content, Callable[[Any, str, ReadOptions], str | None]] = {
    "text": read_text,
    "checked_text": read_checked_text,
    "jsonl": parse_line,
    "parquet": parse_row,
}


class InputFile(NamedTuple):
    """Input file."""

    path: str
    content: Content
    size: int
    """Bytes on disk."""
    identity: FileId

    @property
    def lines(self) -> bool:
        """True if each line is a document. Otherwise, the file is one document or a table."""
        return self.content == "jsonl"


class Batch(NamedTuple):
    """Batch of consecutive documents: whole files, or records of one file."""

    paths: list[str]
    content: Content
    lines: Sequence[bytes | None]
    """JSON lines or Parquet rows of paths[0]. Empty if the files are documents."""
    first_line: int
    """Number of lines[0] in its file, from 1."""
    consumed: int
    """Bytes on disk of the whole input up to the end of this batch."""


def find_files(
    inputs: Sequence[str | Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kind: Literal["auto", "text", "jsonl"] = "auto",
    options: ReadOptions = _DEFAULTS,
    skipped: Skipped | None = None,
) -> list[InputFile]:
    """Return the files of the inputs: a file, or the files below a folder that match.

    include, exclude: shell patterns, matched with a file's name and with its path from the folder, in which `*` crosses
    slashes (`--exclude 'test/*'`). Inputs keep their order; a folder's files are sorted by path.
    kind: auto decides by content and name (`formats`); text and jsonl read every file as such.
    skipped: counts what was left out of folders.

    Raises:
        DataError: an input that does not exist or has a format that is not read, a folder without include, a pattern
            that matches no file; files of a folder that cannot be read, unless options say skip.
    """
    skipped = Skipped() if skipped is None else skipped
    patterns = Patterns(include, exclude)
    files: list[InputFile] = []
    any_folder = False
    for input_ in map(str, inputs):
        if os.path.isdir(input_):
            if not include:
                raise DataError(f"{input_} is a folder: select files, for example with --include '*.py'")
            any_folder = True
            for found in walk(input_, patterns, options, skipped):
                files += _found_file(found, kind, options, skipped)
        else:
            files.append(_named_file(input_, kind))
    if not inputs:
        raise DataError("no input: give at least one file or folder")
    if (include or exclude) and not any_folder:
        raise DataError("--include and --exclude choose files of folders, and none of the inputs is a folder")
    refuse_unmatched(patterns, skipped)
    return files


def _named_file(path: str, kind: Kind) -> InputFile:
    if not os.path.exists(path):
        raise DataError(f"{path}: {'a link to a missing file' if os.path.islink(path) else 'no such file or folder'}")
    if not os.path.isfile(path):
        raise DataError(f"{path}: a pipe or device, not a file: write its content to a file first")
    info = os.stat(path)
    try:
        content = detect_format(path, chosen_by_pattern=False) if kind == "auto" else kind
    except BadRecord as error:
        raise error.without_option() from error
    return InputFile(path, content, info.st_size, file_id(info))


def _found_file(found: FoundFile, kind: Kind, options: ReadOptions, skipped: Skipped) -> list[InputFile]:
    """Return the file, or an empty list if it is left out."""
    try:
        if kind != "auto":
            content = kind
        elif has_text_name(found.path):
            content = "checked_text"  # by the worker that reads it: there may be a million files
        else:
            content = detect_format(found.path, chosen_by_pattern=True)
    except BadRecord as error:
        if not options.skips(error.kind):
            raise
        skipped.add(error.kind)
        return []
    return [InputFile(found.path, content, found.info.st_size, file_id(found.info))]


def iterate_batches(
    files: Sequence[InputFile], options: ReadOptions = _DEFAULTS, skipped: Skipped | None = None
) -> Iterator[Batch]:
    """Yield batches of the files' documents, in order.

    Raises:
        DataError: a file of records that is empty, cannot be read, is truncated or corrupt. If options say skip, its
            records up to there are kept, and it is counted in `skipped`.
    """
    skipped = Skipped() if skipped is None else skipped
    done, size = 0, 0
    waiting: list[InputFile] = []
    for file in files:
        if waiting and (
            file.content != waiting[0].content or size + file.size > BATCH_BYTES or len(waiting) == BATCH_FILES
        ):
            yield _batch_of_files(waiting, done)
            waiting, size = [], 0
        if file.content in ("jsonl", "parquet"):
            for batch in _record_batches(file, options, skipped):
                yield batch._replace(consumed=done + batch.consumed)
        else:
            waiting.append(file)
            size += file.size
        done += file.size
    if waiting:
        yield _batch_of_files(waiting, done)


def _batch_of_files(files: Sequence[InputFile], consumed: int) -> Batch:
    return Batch([file.path for file in files], files[0].content, [], 1, consumed)


def _record_batches(file: InputFile, options: ReadOptions, skipped: Skipped) -> Iterator[Batch]:
    """Yield batches of one file; consumed counts its own bytes."""
    lines: list[bytes | None] = []
    size, count, is_empty = 0, 0, True
    try:
        for line, consumed in _iterate_records(file, options, skipped):
            count += 1
            lines.append(line)
            size += len(line or b"")
            is_empty = is_empty and line is not None and is_blank(line)
            if size >= BATCH_BYTES:
                yield Batch([file.path], file.content, lines, count - len(lines) + 1, consumed())
                lines, size = [], 0
        if is_empty and file.content == "jsonl" or count == 0:
            raise BadRecord(f"{file.path}: empty; it should have a document per line or row", "empty_file")
    except BadRecord as error:
        if not options.skips(error.kind):
            raise
        skipped.add(error.kind)
    if lines:
        yield Batch([file.path], file.content, lines, count - len(lines) + 1, file.size)


def _iterate_records(
    file: InputFile, options: ReadOptions, skipped: Skipped
) -> Iterator[tuple[bytes | None, Callable[[], int]]]:
    """Yield records, each with a function that returns the bytes on disk read so far."""
    if file.content == "jsonl":
        with open_input(file.path) as stream:
            for line in _iterate_lines(stream, file.path, options, skipped):
                yield line, stream.consumed_bytes
        return
    for rows, fraction in iterate_rows(file.path, options):
        for row in rows:
            yield row, partial(_bytes_read, fraction, file.size)


def _iterate_lines(stream: InputStream, path: str, options: ReadOptions, skipped: Skipped) -> Iterator[bytes]:
    """Yield lines; a blank one in place of each that is too long and left out."""
    limit, number = options.max_document_bytes, 0
    while line := stream.readline(limit + 1):
        number += 1
        try:
            refuse_large(line, f"{path}:{number}", options)
        except BadRecord as error:
            if not options.skips(error.kind):
                raise
            skipped.add(error.kind)
            while line and not line.endswith(b"\n"):
                line = stream.readline(limit)
            line = b"\n"
        yield line


def _bytes_read(fraction: float, size: int) -> int:
    return int(fraction * size)


def parse_batch(
    batch: Batch, options: ReadOptions, skipped: list[str] | None = None
) -> Iterator[tuple[str, str | None]]:
    """Yield (where, text) of each document of a batch; text None where a bad record is left out.

    Blank lines are no documents. skipped: receives the kind of each bad record.

    Raises:
        BadRecord: naming the file and the line or byte; not if options say skip.
    """
    parse = _PARSE[batch.content]
    for where, record in _records(batch):
        try:
            text = parse(record, where, options)
        except BadRecord as error:
            if not options.skips(error.kind):
                raise
            if skipped is not None:
                skipped.append(error.kind)
            text = None
        yield where, text


def _records(batch: Batch) -> Iterator[tuple[str, Any]]:
    """Yield the name and the record of each document."""
    if batch.content in ("text", "checked_text"):
        yield from zip(batch.paths, batch.paths)
    for number, line in enumerate(batch.lines, start=batch.first_line):
        if batch.content == "parquet" or not is_blank(line or b""):
            yield f"{batch.paths[0]}:{number}", line
