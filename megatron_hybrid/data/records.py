"""Documents of records: a JSON line, a row of a Parquet column, or a whole file.

- `ReadOptions`: which member holds the document, and what becomes of bad records.
- `Skipped`: counts of what was left out, by kind.
- `parse_line`, `parse_row`, `read_text`: the document, or BadRecord.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from megatron_hybrid.data.compressed import open_input
from megatron_hybrid.data.errors import BadRecord
from megatron_hybrid.data.formats import refuse_format, refuse_json_lines

_UTF8_KINDS = ("not_utf8", "lone_surrogate")
_DEFAULT_MIB = 32
_MOST_VALUES = 1_500_000
"""Values in a JSON line. Parsed, they take at most about 200 MB, and 20 bytes per byte of the line."""
_SHORT_LINE = 1 << 20
"""Bytes of a line whose values need no count."""
_MANY_VALUES = re.compile(rb'(?:(?:[^",\[{]++|"(?:[^"\\]++|\\.)*+")*+[,\[{]){%d}+' % (_MOST_VALUES + 1), re.DOTALL)
"""Begin of JSON with more marks of values outside its strings than that."""
FILE_KINDS = frozenset(
    [
        "empty_file",
        "unreadable_file",
        "unreadable_folder",
        "unsupported_format",
        "git_lfs_pointer",
        "dangling_link",
        "link_to_file_already_taken",
        "link_to_folder_already_read",
        "special_file",
        "name_in_other_case",
    ]
)
"""Kinds for which whole files or folders are left out. All other kinds are about documents."""


@dataclass(frozen=True)
class ReadOptions:
    """Options of reading documents."""

    json_key: str = "text"
    """Member of a JSON line, or column of a Parquet file, that holds the document."""
    bad_utf8: Literal["error", "skip", "replace"] | None = None
    """Reaction to documents that are not UTF-8: stop, leave out, or replace each wrong byte by U+FFFD. None: see `bad_records`."""
    bad_records: Literal["error", "skip"] = "error"
    """Reaction to records and files that cannot be read: stop, or leave out and count."""
    max_document_mib: int = _DEFAULT_MIB
    """Most MiB of a document: a decompressed text file, a JSON line, or a value of Parquet. Larger ones are bad records."""

    @classmethod
    def of(cls, arguments: Any) -> Self:
        """Return the options among the arguments of a command, which have the names of the fields."""
        return cls(**{option.name: getattr(arguments, option.name) for option in fields(cls)})

    @property
    def max_document_bytes(self) -> int:
        return self.max_document_mib << 20

    def skips(self, kind: str) -> bool:
        """Return True if bad records of a kind are left out."""
        choice = self.bad_utf8 if kind in _UTF8_KINDS and self.bad_utf8 is not None else self.bad_records
        return choice == "skip"


@dataclass
class Skipped:
    """Counts of omitted records and files by kind."""

    documents: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str) -> None:
        """Count one."""
        (self.files if kind in FILE_KINDS else self.documents)[kind] += 1

    def update(self, kinds: Iterable[str]) -> None:
        """Count several."""
        for kind in kinds:
            self.add(kind)


_BYTE_ORDER_MARK = "\ufeff"
"""Left out where a file or a line begins. Rows of a table have none: there it is text."""


def is_blank(line: bytes) -> bool:
    """Return True if a line has no record."""
    return line.isspace() or (line.startswith(codecs.BOM_UTF8) and not line[3:].strip())


def read_text(path: str, where: str, options: ReadOptions) -> str:
    """Return a file as one document."""
    return _decode(_read_whole(path, where, options), where, 0, options).removeprefix(_BYTE_ORDER_MARK)


def read_checked_text(path: str, where: str, options: ReadOptions) -> str:
    """Return a file as one document, if its content is text."""
    data = _read_whole(path, where, options)
    try:
        text = _decode(data, where, 0, options).removeprefix(_BYTE_ORDER_MARK)
    except BadRecord as error:
        if not options.skips(error.kind):
            refuse_format(path, data[:1024])  # gives a better reason
        raise
    refuse_format(path, data[:1024])
    if b"\0" in data:
        raise BadRecord(f"{where}: byte {data.index(0)}: binary data (a NUL byte), not text", "binary")
    refuse_json_lines(path, data)
    return text


def _read_whole(path: str, where: str, options: ReadOptions) -> bytes:
    with open_input(path) as stream:
        data = stream.read(options.max_document_bytes + 1)
    refuse_large(data, where, options)
    return data


def refuse_large(record: bytes, where: str, options: ReadOptions) -> None:
    """Raise BadRecord if a record is longer than the limit. The record may be cut after the limit."""
    if len(record) > options.max_document_bytes:
        raise BadRecord(
            f"{where}: a document of more than {options.max_document_mib} MiB. If it is no damage or compression bomb: "
            "raise --max-document-mib",
            "too_large",
        )


def _refuse_many_values(line: bytes, where: str) -> None:
    """Raise BadRecord for a JSON line whose values, parsed, take many times its size."""
    if len(line) > _SHORT_LINE and _MANY_VALUES.match(line):
        raise BadRecord(f"{where}: a JSON line of more than {_MOST_VALUES:,} values, not a document", "too_large")


def parse_line(line: bytes, where: str, options: ReadOptions) -> str:
    """Return the document in a JSON line."""
    _refuse_many_values(line, where)
    text = _decode(line, where, 1, options).removeprefix(_BYTE_ORDER_MARK)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise BadRecord(f"{where}: broken JSON: {error}", "not_json") from error
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        raise BadRecord(
            f"{where}: broken JSON: {error}{' (the line is cut)' if is_cut else ''} "
            "(a file that is one document: --format text; JSON over several lines: convert it with `jq -c .`)",
            "cut_line" if is_cut else "not_json",
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadRecord(f"{where}: broken JSON: {error}", "not_json") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{where}: a JSON object is needed, this is a {type(value).__name__}", "not_an_object")
    return _member(value, where, options)


def _member(value: dict[str, Any], where: str, options: ReadOptions) -> str:
    key = options.json_key
    if key not in value:
        keys = ", ".join(map(repr, value)) or "none"
        raise BadRecord(f"{where}: no member {key!r} (it has: {keys}); name another with --json-key", "missing_key")
    document = value[key]
    if not isinstance(document, str):
        kind = "null" if document is None else "not_a_string"
        raise BadRecord(f"{where}: member {key!r} is a {type(document).__name__}, not a string", kind)
    if not document.isascii():
        try:
            document.encode("utf-8")
        except UnicodeEncodeError as error:  # an escape such as \ud800 alone
            if options.bad_utf8 != "replace":
                raise BadRecord(
                    f"{where}: character {error.start} of {key!r} is half a surrogate pair, which no text holds. "
                    "Repair it, or use --bad-utf8 skip or replace",
                    "lone_surrogate",
                ) from error
            return document.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
    return document


def parse_row(value: bytes | None, where: str, options: ReadOptions) -> str:
    """Return the document in a row of a Parquet column."""
    if value is None:
        raise BadRecord(f"{where}: column {options.json_key!r} is null, not a string", "null")
    refuse_large(value, where, options)
    return _decode(value, where, 0, options)


def _decode(data: bytes, where: str, first: int, options: ReadOptions) -> str:
    """Return the text of UTF-8 bytes. first: the number of the first byte in an error."""
    try:
        errors = "replace" if options.bad_utf8 == "replace" else "strict"
        return data.decode("utf-8", errors=errors)
    except UnicodeDecodeError as error:
        raise BadRecord(
            f"{where}: byte {error.start + first}: not UTF-8 ({error.reason}). "
            "Convert or exclude it, or use --bad-utf8 skip or replace",
            "not_utf8",
        ) from error
