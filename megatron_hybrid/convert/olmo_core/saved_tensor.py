"""Slices of tensors as `torch.save` wrote them: a zip with a pickle, `data.pkl`, and the numbers.

The pickle is read by `restricted_pickle`. The numbers are not pickled.
"""

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.base.errors import shown
from megatron_hybrid.checkpoint.safetensors_header import ITEM_BYTES, StoredTensor
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.olmo_core.restricted_pickle import ENTRY_NAMES, restricted_load

_MAX_MEMBER_BYTES = 1 << 16
_MAX_READ_BYTES = 1 << 20
"""Most bytes that are read at once. torch.save's list of members has about 500 bytes."""
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True)
class SavedSlice:
    """A slice of a tensor, and the bytes of a file that `torch.save` wrote for it."""

    slice: TensorSlice
    path: Path
    at: int
    length: int


def locate_values(key: str, dtype: str, saved: SavedSlice) -> StoredTensor:
    """Return the bytes that hold the values of a slice of tensor `key`.

    Raises:
        ConversionError: not what `torch.save` writes, or not a plain tensor of this type and shape.
    """
    where = f"{saved.path}: {key} at byte {saved.at}"
    with open(saved.path, "rb") as file:
        window = _Window(file, saved.at, saved.length)
        try:
            with zipfile.ZipFile(window) as archive:
                begin = _find_values(where, saved, dtype, window, archive)
        except ConversionError:
            raise
        except (zipfile.BadZipFile, NotImplementedError, KeyError, ValueError, EOFError, struct.error) as error:
            raise ConversionError(f"{where}: not what torch.save writes ({str(error)[:200]}); damaged") from None
    nbytes = saved.slice.numel * ITEM_BYTES[dtype]
    if begin + nbytes > saved.length:
        raise ConversionError(f"{where}: damaged; its data would end behind it")
    return StoredTensor(saved.path, dtype, saved.slice.shape, saved.at + begin, saved.at + begin + nbytes)


def _find_values(where: str, saved: SavedSlice, dtype: str, window: "_Window", archive: zipfile.ZipFile) -> int:
    """Return the position of the values in the archive."""
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    storage, offset = _describe(where, saved, dtype, archive, members)
    data = members[f"data/{storage}"]
    item = ITEM_BYTES[dtype]
    if data.compress_type != zipfile.ZIP_STORED or (offset + saved.slice.numel) * item > data.file_size:
        raise ConversionError(f"{where}: its data is compressed or too short; not readable")
    window.seek(data.header_offset)
    fields = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
    if fields[0] != b"PK\x03\x04":
        raise ConversionError(f"{where}: damaged; its data would end behind it")
    name_length, extra_length = fields[-2:]
    return data.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length) + offset * item


def _describe(
    where: str, saved: SavedSlice, dtype: str, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]
) -> tuple[Any, int]:
    """Return the name of the storage, and the tensor's first element in it."""
    if "byteorder" in members and _read_member(where, archive, members["byteorder"])[:6] != b"little":
        raise ConversionError(f"{where}: big-endian; not readable")
    described = restricted_load(_read_member(where, archive, members["data.pkl"]), ENTRY_NAMES, where)
    if not isinstance(described, tuple) or len(described) != 5 or described[0] != "tensor":
        raise ConversionError(f"{where}: not a plain tensor; not readable")
    _, storage, offset, size, stride = described
    if not isinstance(storage, tuple) or len(storage) != 5 or storage[0] != "storage" or storage[1] != dtype:
        raise ConversionError(f"{where}: its storage is {shown(storage)}, {dtype} was expected")
    shape = saved.slice.shape
    in_rows = stride == _row_major(shape) or prod(shape) <= 1
    if size != shape or not in_rows or type(offset) is not int or offset < 0:
        raise ConversionError(
            f"{where}: of shape {shown(size)} and strides {shown(stride)}; {shape}, row-major, was expected"
        )
    return storage[2], offset


def _read_member(where: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Return a small member of the archive. torch.save compresses none, and a compressed one could expand without limit."""
    if member.compress_type != zipfile.ZIP_STORED or max(member.file_size, member.compress_size) > _MAX_MEMBER_BYTES:
        raise ConversionError(f"{where}: its {shown(member.filename)} is compressed or too large; refused")
    return archive.read(member)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


class _Window(io.RawIOBase):
    """Bytes [at, at + length) of a file, as a file."""

    def __init__(self, file: BinaryIO, at: int, length: int) -> None:
        self._file, self._at, self._length, self._position = file, at, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("seek before the beginning")
        self._position = base + offset
        return self._position

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        count = left if count is None or count < 0 else min(count, left)
        if count > _MAX_READ_BYTES:
            raise zipfile.BadZipFile("its list of members is too long")
        self._file.seek(self._at + self._position)
        data = self._file.read(count)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
