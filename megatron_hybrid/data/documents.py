"""From files on disk to documents: text files, JSONL, folders of source code.

Finding files and cutting them into batches is the main process's; reading and parsing a batch is a worker's.

- `find_files`: the files of the inputs, in an order that depends on their names alone.
- `iterate_batches`: about 1 MiB of work at a time, so that memory does not grow with the input.
- `parse_batch`: a batch's documents.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_hybrid.data.compressed import open_input
from megatron_hybrid.data.errors import DataError

BATCH_BYTES = 1 << 20
BATCH_FILES = 256
_COMPRESSED = (".gz", ".zst")
_JSONL = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read."""

    json_key: str = "text"
    """Member of a JSON line that holds the document."""
    bad_utf8: Literal["error", "skip", "replace"] = "error"
    """What to do about a document that is not UTF-8: stop, leave it out, or put U+FFFD where it is not."""


class InputFile(NamedTuple):
    """A file to read."""

    path: str
    lines: bool
    """One document a JSON line; else the file is one document."""
    size: int
    """Bytes on disk."""


class Batch(NamedTuple):
    """Consecutive documents of the input: either whole files or lines of one file."""

    paths: list[str]
    lines: list[bytes] | None
    """JSON lines of paths[0]; None: the files are documents."""
    first_line: int
    """Number of lines[0] in its file, from 1."""
    consumed: int
    """Bytes on disk of the whole input up to the end of this batch."""


def find_files(
    inputs: Sequence[str | Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kind: Literal["auto", "text", "jsonl"] = "auto",
) -> list[InputFile]:
    """Files of the inputs: a file stands for itself, a folder for the files below it that match.

    include, exclude: shell patterns, matched with a file's name and with its path from the folder, in which `*` crosses
    slashes (`--exclude 'test/*'`). Inputs keep their order; a folder's files are sorted by path.
    kind: auto takes .jsonl, .ndjson and .json (and these as .gz or .zst) for JSONL, all else for text.

    Raises:
        DataError: an input that does not exist, a folder without include, or with no file that matches.
    """
    files: list[str] = []
    for input_ in map(str, inputs):
        if os.path.isdir(input_):
            if not include:
                raise DataError(f"{input_} is a folder: say which files to take, such as --include '*.py'")
            files += _walk(input_, include, exclude)
        elif os.path.isfile(input_):
            files.append(input_)
        else:
            raise DataError(f"{input_}: no such file or folder")
    if not files:
        raise DataError("no input: give at least one file or folder")
    return [
        InputFile(path, kind == "jsonl" or (kind == "auto" and _is_jsonl(path)), os.path.getsize(path))
        for path in files
    ]


def _walk(folder: str, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Files below a folder that match, sorted by their path from it."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")

            def matches(patterns: Sequence[str], path: str = path, name: str = name) -> bool:
                return any(fnmatchcase(path, pattern) or fnmatchcase(name, pattern) for pattern in patterns)

            if matches(include) and not matches(exclude) and os.path.isfile(os.path.join(folder, path)):
                found.append(path)
    if not found:
        raise DataError(f"{folder}: no file matches {', '.join(include)}" + (" and is not excluded" if exclude else ""))
    return [os.path.join(folder, path) for path in sorted(found, key=os.fsencode)]


def _is_jsonl(path: str) -> bool:
    stem, suffix = os.path.splitext(path)
    return (os.path.splitext(stem)[1] if suffix in _COMPRESSED else suffix) in _JSONL


def iterate_batches(files: Sequence[InputFile]) -> Iterator[Batch]:
    """Batches of the files' documents, in order.

    Raises:
        DataError: a JSONL file that is empty, cannot be read, is truncated or corrupt.
    """
    done, size = 0, 0
    paths: list[str] = []
    for file in files:
        if paths and (file.lines or size + file.size > BATCH_BYTES or len(paths) == BATCH_FILES):
            yield Batch(paths, None, 1, done)
            paths, size = [], 0
        if file.lines:
            for batch in _line_batches(file):
                yield batch._replace(consumed=done + batch.consumed)
        else:
            paths.append(file.path)
            size += file.size
        done += file.size
    if paths:
        yield Batch(paths, None, 1, done)


def _line_batches(file: InputFile) -> Iterator[Batch]:
    """Batches of one JSONL file; consumed counts its own bytes."""
    with open_input(file.path) as stream:
        lines, size, number = [], 0, 0
        for line in stream:
            number += 1
            lines.append(line)
            size += len(line)
            if size >= BATCH_BYTES:
                yield Batch([file.path], lines, number - len(lines) + 1, stream.consumed_bytes())
                lines, size = [], 0
        if number == 0:
            raise DataError(f"{file.path}: empty; a JSONL file has a document a line. Leave it out if this is meant")
        if lines:
            yield Batch([file.path], lines, number - len(lines) + 1, file.size)


def parse_batch(batch: Batch, options: ReadOptions) -> Iterator[tuple[str, str | None]]:
    """(where, text) of each document of a batch; text None where it is left out for bad UTF-8.

    Blank lines are no documents.

    Raises:
        DataError: naming the file and the line or byte.
    """
    if batch.lines is None:
        for path in batch.paths:
            with open_input(path) as stream:
                yield path, _decode(stream.read(), f"{path}: byte ", 0, options)
        return
    for number, line in enumerate(batch.lines, start=batch.first_line):
        if line.isspace():
            continue
        where = f"{batch.paths[0]}:{number}"
        text = _decode(line, f"{where}: byte ", 1, options)
        yield where, None if text is None else _member(text, where, options)


def _decode(data: bytes, where: str, first: int, options: ReadOptions) -> str | None:
    """Text of UTF-8 bytes, without a byte-order mark. first: what the first byte is called in an error."""
    try:
        return data.decode("utf-8", errors="replace" if options.bad_utf8 == "replace" else "strict").removeprefix(
            "\ufeff"
        )
    except UnicodeDecodeError as error:
        if options.bad_utf8 == "skip":
            return None
        raise DataError(
            f"{where}{error.start + first}: not UTF-8 ({error.reason}). "
            "Convert or exclude it, or use --bad-utf8 skip or replace"
        ) from error


def _member(text: str, where: str, options: ReadOptions) -> str | None:
    """The document in a JSON line."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: broken JSON: {error} (a file that is one document: --format text)") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is needed, this is a {type(value).__name__}")
    if options.json_key not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise DataError(f"{where}: no member {options.json_key!r} (it has: {keys}); name another with --json-key")
    document = value[options.json_key]
    if not isinstance(document, str):
        raise DataError(f"{where}: member {options.json_key!r} is a {type(document).__name__}, not a string")
    if not document.isascii():
        try:
            document.encode("utf-8")
        except UnicodeEncodeError as error:  # an escape such as \ud800 alone
            if options.bad_utf8 == "skip":
                return None
            if options.bad_utf8 == "error":
                raise DataError(
                    f"{where}: character {error.start} of {options.json_key!r} is half a surrogate pair, which no text "
                    "holds. Repair it, or use --bad-utf8 skip or replace"
                ) from error
            return document.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return document
