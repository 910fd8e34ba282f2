"""Format of an input file, by its content first and its name second. An unknown format is an error, never text.

- `detect_format`: text, JSON lines or Parquet, from the first bytes of a file.
- `refuse_format`: name a format that holds no documents this tool can read.
"""

import codecs
import json
import os
import re
from collections.abc import Callable
from typing import Literal

from megatron_hybrid.data.compressed import COMPRESSED_SUFFIXES, open_input
from megatron_hybrid.data.errors import BadRecord

Format = Literal["text", "jsonl", "parquet"]

_HEAD = 1 << 16
_JSON_SUFFIXES = frozenset([".jsonl", ".ndjson", ".json", ".jsonlines", ".jl", ".ldjson"])
_TEXT_SUFFIXES = frozenset(
    "." + suffix
    for line in [
        "txt text md markdown rst tex bib org adoc srt vtt html htm xhtml xml css scss svg yaml yml toml ini cfg conf",
        "py pyi pyx ipynb c h cc cpp cxx hh hpp cu cuh m mm cs java kt kts scala go rs swift js mjs cjs ts tsx jsx vue",
        "rb php pl pm lua jl r f f90 for hs ml mli ex exs erl clj lisp el scm dart zig nim d pas v sv vhd sql sh bash",
        "zsh ps1 bat cmake mk proto graphql tf gradle s asm lean agda sol diff patch log",
    ]
    for suffix in line.split()
)
"""Suffixes of plain text and source code. `.jl` is also Julia; the content decides."""
_SUFFIX_REMEDIES = {
    ".csv": "a table, not documents: write its text column as JSON lines",
    ".tsv": "a table, not documents: write its text column as JSON lines",
}
_TO_JSONL = "write its documents as JSON lines or Parquet"
_NO_TEXT = "it holds no text: leave it out with --exclude"
_MAGIC: list[tuple[bytes, str, str]] = [
    (b"PARE", "encrypted Parquet", "decrypt it"),
    (b"ORC", "ORC", _TO_JSONL),
    (b"Obj\x01", "Avro", _TO_JSONL),
    (b"ARROW1", "Arrow (or Feather)", _TO_JSONL),
    (b"FEA1", "Feather", _TO_JSONL),
    (b"\xff\xff\xff\xff", "an Arrow stream", _TO_JSONL),
    (b"SQLite format 3\0", "SQLite", _TO_JSONL),
    (b"\x89HDF\r\n\x1a\n", "HDF5", _TO_JSONL),
    (b"\x93NUMPY", "a NumPy array", "tokens go to data.train as they are; text must be JSON lines"),
    (b"MMIDIDX\0\0", "the index of a tokenized dataset", "give its prefix to data.train as it is"),
    (b"GGUF", "GGUF weights", _NO_TEXT),
    *((b"\x80" + bytes([version]), "a Python pickle", _TO_JSONL) for version in range(2, 6)),
    (b"WARC/", "WARC", "extract its text, and write it as JSON lines"),
    (b"{\\rtf", "RTF", "convert it to plain text"),
    (b"%PDF-", "PDF", "extract its text"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Microsoft Office document", "extract its text"),
    (b"\x89PNG\r\n", "a PNG image", _NO_TEXT),
    (b"\xff\xd8\xff", "a JPEG image", _NO_TEXT),
    (b"GIF8", "a GIF image", _NO_TEXT),
    (b"RIFF", "RIFF audio or images", _NO_TEXT),
    (b"II*\0", "a TIFF image", _NO_TEXT),
    (b"MM\0*", "a TIFF image", _NO_TEXT),
    (b"\x7fELF", "an ELF executable", _NO_TEXT),
    (b"\0asm", "WebAssembly", _NO_TEXT),
    (codecs.BOM_UTF32_LE, "UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    (codecs.BOM_UTF32_BE, "UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8"),
    (codecs.BOM_UTF16_LE, "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8"),
]
_TEXT_MAGIC = (b"WARC/", b"{\\rtf", b"%PDF-")
"""Formats that begin with text. Other magic of ASCII characters only counts in front of binary content."""
_ALL_MAGIC = tuple(magic for magic, _, _ in _MAGIC)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_PART = re.compile(r"part-\d")


def refuse_format(path: str, head: bytes) -> None:
    """Raise BadRecord if the first bytes of a file are those of an unsupported format."""
    if head.startswith(_ALL_MAGIC):
        magic, name, remedy = next(row for row in _MAGIC if head.startswith(row[0]))
        if magic in _TEXT_MAGIC or not magic.isascii() or _CONTROL.search(head):
            raise _unsupported(path, f"{name}, which is not read: {remedy}")
    if head[257:262] == b"ustar":
        raise _unsupported(path, "a tar archive, which is not read: unpack it (`tar -xf`) and give its files")
    if head[8:10] == b'{"' and head[4:8] == bytes(4):  # eight bytes of length, then a JSON header
        raise _unsupported(path, f"safetensors, which is not read: {_NO_TEXT}")


def _unsupported(path: str, what: str) -> BadRecord:
    return BadRecord(f"{path}: {what}", "unsupported_format")


def has_text_name(path: str) -> bool:
    """Return True if a file has the suffix of text or source code, whose content is checked when it is read."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix in _TEXT_SUFFIXES and suffix not in _JSON_SUFFIXES


def detect_format(path: str, chosen_by_pattern: bool) -> Format:
    """Return the format of a file.

    chosen_by_pattern: the file was found in a folder by --include, so that any suffix may be source code.

    Raises:
        BadRecord: a format that is not read, or an unknown one; a file that cannot be read.
    """
    suffix = _inner_suffix(path)
    try:
        with open_input(path) as stream:
            head = stream.read1(_HEAD)
    except BadRecord as error:
        if error.kind in ("truncated_file", "corrupt_file") and suffix in _JSON_SUFFIXES | _TEXT_SUFFIXES:
            return _format_by_name(suffix)  # the reader of the file reports it, with the documents that can be read
        raise
    if head.startswith(b"PAR1") and _CONTROL.search(head):
        return "parquet"
    refuse_format(path, head)
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if not head:
        may_be_text = chosen_by_pattern and suffix not in _JSON_SUFFIXES and not _is_part(path)
        return "text" if may_be_text or suffix in _TEXT_SUFFIXES - _JSON_SUFFIXES else "jsonl"
    return _detect_text(path, suffix, head, chosen_by_pattern)


def _inner_suffix(path: str) -> str:
    """Return the suffix in lower case, below that of a compression."""
    stem, suffix = os.path.splitext(os.path.basename(path).lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSED_SUFFIXES else suffix


def _is_part(path: str) -> bool:
    """Return True for file names of Spark, which do not describe the content."""
    return _PART.match(os.path.basename(path)) is not None


def _format_by_name(suffix: str) -> Format:
    return "jsonl" if suffix in _JSON_SUFFIXES else "text"


def _detect_text(path: str, suffix: str, head: bytes, chosen_by_pattern: bool) -> Format:
    """Return text or jsonl for content that begins with `head`."""
    is_text_name, is_json_name = suffix in _TEXT_SUFFIXES, suffix in _JSON_SUFFIXES
    looks = _classify_json(head)
    if is_text_name and not is_json_name:
        refuse_json_lines(path, head)
    elif looks == "lines":
        return "jsonl"
    elif looks is not None:
        raise _unsupported(path, _JSON_REMEDIES[looks])
    elif is_json_name and not is_text_name:
        return "jsonl"
    if suffix in _SUFFIX_REMEDIES:
        raise _unsupported(path, f"{_SUFFIX_REMEDIES[suffix]} (or take it whole: --format text)")
    if b"\0" in head:
        raise BadRecord(f"{path}: binary data (a NUL byte at byte {head.index(0)}), not text", "binary")
    if is_text_name or (chosen_by_pattern and not _is_part(path)):
        return "text"
    raise _unsupported(
        path, "unknown format: use --format text (the file is one document) or --format jsonl (a document per line)"
    )


_JSON_REMEDIES = {
    "array": "a JSON array, not JSON lines: convert it with `jq -c '.[]' FILE > FILE.jsonl` (or take it whole: "
    "--format text)",
    "pretty": "JSON over several lines, not JSON lines: convert it with `jq -c . FILE > FILE.jsonl` (or take it whole: "
    "--format text)",
}


def _classify_json(head: bytes) -> Literal["lines", "array", "pretty"] | None:
    """Return which JSON a file begins with, None if it does not."""
    first, newline, _ = head.partition(b"\n")
    inner = head[1:].lstrip()[:1]
    if head[:1] == b"[":
        return "array" if inner in (b"{", b'"') else None
    if head[:1] != b"{":
        return None
    if _parses(first, json.loads) or (not newline and inner == b'"'):  # the latter: longer than what was read, or cut
        return "lines"
    return "pretty" if first.strip() == b"{" or _parses(head, json.JSONDecoder().raw_decode) else None


def _parses(data: bytes, parse: Callable[[str], object]) -> bool:
    try:
        parse(data.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def refuse_json_lines(path: str, head: bytes) -> None:
    """Raise BadRecord if the content of a file with a name of text is JSON lines. head: at least its first line."""
    if head[:1] == b"{" and _parses(head.split(b"\n", 1)[0], json.loads):
        raise _unsupported(
            path,
            "JSON lines under the name of a text file: use --format jsonl (a document per line) or --format text (the "
            "file is one document)",
        )
