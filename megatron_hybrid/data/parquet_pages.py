"""Sizes of the pages of a Parquet column, from the headers of the pages, before anything is decompressed.

The footer's sizes are not used: a reader allocates what a page's header says.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron_hybrid.data.errors import BadRecord, DataError

_MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 16 << 20
"""The footer of a file with 1,000 row groups of 10 columns has about 1 MB."""
_MAX_HEADER_BYTES = 1 << 20
_MOST_PAGES = 50_000
"""Pages in a column of a row group. Writers aim at 1 MiB each."""
_STRUCT, _BINARY, _DOUBLE = 12, 8, 7
_BOOLEANS = {1: True, 2: False}
_INTEGERS = (3, 4, 5, 6)
_DATA_HEADERS = (5, 8)
"""Fields of a page header that hold the header of a data page of version 1 or 2."""


def refuse_large_footer(path: str) -> None:
    """Raise an error if the footer of a file is cut or too large to be parsed."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if len(tail) < 8 or tail[4:] != _MAGIC:
        raise _corrupt(path, "it does not end with a footer")
    length = int.from_bytes(tail[:4], "little")
    if length > _MAX_FOOTER_BYTES:
        raise BadRecord(
            f"{path}: a footer of {length:,} bytes, more than {_MAX_FOOTER_BYTES >> 20} MiB. If it is no damage: write the file "
            "with larger row groups, or its documents as JSON lines",
            "too_large",
        )


def largest_page(path: str, chunk: Any) -> int:
    """Return the decompressed bytes of the largest page of a column in a row group.

    Args:
        chunk: pyarrow's ColumnChunkMetaData.

    Raises:
        BadRecord: a header is corrupt.
    """
    starts = [chunk.data_page_offset]
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < starts[0]:
        starts.append(chunk.dictionary_page_offset)
    with open(path, "rb") as file:
        try:
            pages = _pages(file, min(starts), chunk.total_compressed_size, chunk.num_values)
            return max(pages, default=0)
        except (IndexError, ValueError, TypeError, OverflowError) as error:
            raise _corrupt(path, f"the header of a page is damaged ({error})") from error


def _corrupt(path: str, reason: str) -> BadRecord:
    return BadRecord(f"{path}: corrupt or truncated Parquet: {reason}", "corrupt_file")


def _pages(file: BinaryIO, at: int, length: int, values: int) -> Iterator[int]:
    """Yield the decompressed bytes of pages until they have `values` values, as the reader does."""
    end = at + length
    for _ in range(_MOST_PAGES):
        if at >= end or values <= 0:
            return
        file.seek(at)
        header, header_bytes = _read_header(file)
        decompressed, compressed = header[2], header[3]
        if decompressed < 0 or compressed < 0:
            raise ValueError("a negative size")
        values -= sum(header[field][1] for field in _DATA_HEADERS if field in header)
        at += header_bytes + compressed
        yield decompressed
    raise DataError(
        f"{file.name}: more than {_MOST_PAGES:,} pages in a row group. If it is no damage: write it with pages of 1 MiB"
    )


def _read_header(file: BinaryIO) -> tuple[dict[int, Any], int]:
    """Return a page header by number of the field, and its bytes."""
    data = file.read(256)
    while True:
        try:
            return _read_struct(data, 0, depth=0)
        except (IndexError, struct.error):
            more = file.read(len(data))
            if not more or len(data) > _MAX_HEADER_BYTES:
                raise ValueError("it is cut or too long") from None
            data += more


def _read_struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """Return a struct in Thrift's compact protocol, and the position after it."""
    found: dict[int, Any] = {}
    number = 0
    while byte := data[at]:
        at += 1
        kind = byte & 15
        if byte >> 4:
            number += byte >> 4
        else:
            number, at = _read_integer(data, at)
        found[number], at = _read_value(data, at, kind, depth)
    return found, at + 1


def _read_value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in _BOOLEANS:
        return _BOOLEANS[kind], at
    if kind in _INTEGERS:
        return _read_integer(data, at) if kind != 3 else (data[at], at + 1)
    if kind == _BINARY:
        length, at = _read_varint(data, at)
        if at + length > len(data):
            raise IndexError
        return None, at + length
    if kind == _DOUBLE:
        return None, at + 8
    if kind == _STRUCT and depth < 8:
        return _read_struct(data, at, depth + 1)
    raise ValueError(f"a field of type {kind}")


def _read_integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _read_varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[at]) & 128:
        value |= (byte & 127) << shift
        shift += 7
        at += 1
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
    return value | byte << shift, at + 1
