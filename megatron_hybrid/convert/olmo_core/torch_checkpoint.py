"""torch.distributed.checkpoint folders, read without running what is in them.

Such a folder keeps its directory of tensors in a pickle (`.metadata`), and each tensor as `torch.save` wrote it: a zip
whose `data.pkl` is a pickle too. Both are read by `restricted_pickle`, which runs nothing. The numbers themselves are not
pickled: they are read as bytes, at places that are checked against the file.
"""

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.folder import has_file, regular_file
from megatron_hybrid.convert.restricted_pickle import ENTRY_NAMES, METADATA_NAMES, Storage, Tensor, restricted_load
from megatron_hybrid.convert.safetensors_header import ITEM_BYTES, StoredTensor
from megatron_hybrid.convert.source import StoredBox, TensorSource

METADATA = ".metadata"
_MAX_METADATA_BYTES, _MAX_ENTRY_PICKLE_BYTES = 1 << 30, 1 << 16
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True)
class _Part:
    """A chunk of a tensor: a box of it, and the bytes of a file that hold it as torch.save wrote it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    at: int
    length: int


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of the folder."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[_Part, ...]


class TorchCheckpoint:
    """A folder that torch.distributed.checkpoint wrote (OLMo-core's variant included)."""

    def __init__(self, folder: Path):
        """
        Raises:
            ConversionError: not such a folder, or one whose directory is damaged, unsafe or incomplete.
        """
        self.folder = folder
        path = folder / METADATA
        if not has_file(folder, METADATA) or path.is_symlink() or not path.is_file():
            raise ConversionError(
                f"{folder}: it has no {METADATA}; give the folder of a checkpoint, or its model_and_optim"
            )
        if path.stat().st_size > _MAX_METADATA_BYTES:
            raise ConversionError(f"{path}: larger than {_MAX_METADATA_BYTES >> 20} MiB; refused")
        metadata = restricted_load(path.read_bytes(), METADATA_NAMES, str(path))
        try:
            places = {(i.fqn, i.offset): s for i, s in metadata.storage_data.items()}
            self.tensors = {
                name: self._tensor(name, entry, places)
                for name, entry in metadata.state_dict_metadata.items()
                if isinstance(entry, Tensor)
            }
            self.others = {
                name for name, entry in metadata.state_dict_metadata.items() if not isinstance(entry, Tensor)
            }
        except (AttributeError, TypeError, KeyError, IndexError) as error:
            raise ConversionError(f"{path}: damaged ({type(error).__name__}: {str(error)[:200]})") from None
        self.files = [path, *sorted({part.path for t in self.tensors.values() for part in t.parts})]

    def _tensor(self, name: str, entry: Tensor, places: dict[tuple[str, Any], Storage]) -> TorchTensor:
        dtype, shape = entry.properties.state[0], tuple(entry.size)
        if dtype not in ITEM_BYTES or not _sizes(shape):
            raise ConversionError(
                f"{self.folder}: {name!r:.200} is of dtype {dtype!r:.50} and shape {shape!r:.100}; not readable"
            )
        parts = []
        for chunk in entry.chunks:
            offset, size = tuple(chunk.offsets), tuple(chunk.sizes)
            place = places.get((name, offset))
            if place is None:
                raise ConversionError(
                    f"{self.folder}: {name!r:.200} at {offset!r:.100} is in no file; the checkpoint is incomplete"
                )
            if place.transform_descriptors:
                raise ConversionError(
                    f"{self.folder}: {name!r:.200} is compressed ({place.transform_descriptors!r:.100}); not readable"
                )
            if (
                len(offset) != len(shape)
                or len(size) != len(shape)
                or not _sizes(offset)
                or not _sizes((*size, place.offset, place.length))
            ):
                raise ConversionError(
                    f"{self.folder}: {name!r:.200} has a chunk at {offset!r:.100} of {size!r:.100}; damaged"
                )
            path = regular_file(self.folder, place.relative_path)
            if place.offset + place.length > path.stat().st_size:
                raise ConversionError(f"{path}: shorter than {METADATA} says; the checkpoint is incomplete")
            parts.append(_Part(offset, size, path, place.offset, place.length))
        return TorchTensor(dtype, shape, tuple(parts))

    def source(self, key: str, name: str, shape: tuple[int, ...]) -> TensorSource:
        """The tensor `key` as one of `shape`, which may leave out dimensions of length 1.

        Raises:
            ConversionError: parts that are damaged, or do not make up the tensor.
        """
        tensor = self.tensors[key]
        boxes = []
        for part in tensor.parts:
            if any(n != total for n, total in zip(part.shape[2:], tensor.shape[2:], strict=True)):
                raise ConversionError(f"{self.folder}: {key} is split along dimension 2 or later; not readable")
            inner = prod(tensor.shape[2:])
            column, columns = (part.offset[1] * inner, part.shape[1] * inner) if len(tensor.shape) > 1 else (0, 1)
            rows, row = (part.shape[0], part.offset[0]) if tensor.shape else (1, 0)
            if rows and columns:
                stored = self._stored(key, part)
                boxes.append(StoredBox(stored.path, stored.begin, row, rows, column, columns))
        return TensorSource(name, tensor.dtype, shape, tuple(boxes)).check()

    def scalar(self, key: str) -> float:
        """The value of a tensor of one element."""
        (part,) = self.tensors[key].parts
        stored = self._stored(key, part)
        formats = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}
        if stored.dtype not in formats:
            raise ConversionError(f"{self.folder}: {key} is {stored.dtype}; a number was expected")
        with open(stored.path, "rb") as file:
            file.seek(stored.begin)
            return struct.unpack(formats[stored.dtype], file.read(ITEM_BYTES[stored.dtype]))[0]

    def _stored(self, key: str, part: _Part) -> StoredTensor:
        """Where the numbers of a part begin, in the zip that torch.save wrote."""
        where = f"{part.path}: {key} at byte {part.at}"
        with open(part.path, "rb") as file:
            window = _Window(file, part.at, part.length)
            try:
                with zipfile.ZipFile(window) as archive:
                    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                    return self._in_archive(where, part, self.tensors[key].dtype, window, archive, members)
            except (zipfile.BadZipFile, NotImplementedError, KeyError, ValueError, EOFError, struct.error) as error:
                if isinstance(error, ConversionError):
                    raise
                raise ConversionError(f"{where}: not what torch.save writes ({str(error)[:200]}); damaged") from None

    def _in_archive(self, where: str, part: _Part, dtype: str, window: "_Window", archive, members) -> StoredTensor:
        if members["data.pkl"].file_size > _MAX_ENTRY_PICKLE_BYTES:
            raise ConversionError(f"{where}: its data.pkl is too large; refused")
        if "byteorder" in members and archive.read(members["byteorder"])[:6] != b"little":
            raise ConversionError(f"{where}: big-endian; not readable")
        described = restricted_load(archive.read(members["data.pkl"]), ENTRY_NAMES, where)
        if not isinstance(described, tuple) or len(described) != 5 or described[0] != "tensor":
            raise ConversionError(f"{where}: not a plain tensor; not readable")
        _, storage, offset, size, stride = described
        if not isinstance(storage, tuple) or len(storage) != 5 or storage[0] != "storage" or storage[1] != dtype:
            raise ConversionError(f"{where}: its storage is {storage!r:.100}, {dtype} was expected")
        if (
            size != part.shape
            or stride != _row_major(part.shape)
            and prod(part.shape) > 1
            or type(offset) is not int
            or offset < 0
        ):
            raise ConversionError(
                f"{where}: of shape {size!r:.100} and strides {stride!r:.100}; {part.shape} in rows was expected"
            )
        data = members[f"data/{storage[2]}"]
        needed = prod(part.shape) * ITEM_BYTES[dtype]
        skipped = offset * ITEM_BYTES[dtype]
        if data.compress_type != zipfile.ZIP_STORED or skipped + needed > data.file_size:
            raise ConversionError(f"{where}: its data is compressed or too short; not readable")
        window.seek(data.header_offset)
        fields = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
        begin = data.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1] + skipped
        if fields[0] != b"PK\x03\x04" or begin + needed > part.length:
            raise ConversionError(f"{where}: damaged; its data would end behind it")
        return StoredTensor(part.path, dtype, part.shape, part.at + begin, part.at + begin + needed)


def _sizes(values: tuple[Any, ...]) -> bool:
    return len(values) <= 8 and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


class _Window(io.RawIOBase):
    """Bytes [at, at + length) of a file, as a file."""

    def __init__(self, file: io.BufferedReader, at: int, length: int):
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

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        count = left if count is None or count < 0 else min(count, left)
        self._file.seek(self._at + self._position)
        data = self._file.read(count)
        self._position += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
