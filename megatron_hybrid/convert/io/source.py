"""Tensors that lie in files, read a block of rows at a time.

torch is imported only to cast values, because most conversions only move bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.checkpoint.open_files import OpenFiles
from megatron_hybrid.checkpoint.safetensors_header import ITEM_BYTES, StoredTensor
from megatron_hybrid.convert.errors import ConversionError

TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Types in which weights may be stored. Conversions keep F64 as F32."""
BLOCK_BYTES = 4 << 20
"""Size of a block that is read, cast, hashed and written. It fits in a processor's cache between these steps."""
_MAX_SLICES = 4096
"""Most slices per tensor: far more than there are ranks, few enough to compare each with each."""


@dataclass(frozen=True)
class FileSlice:
    """A slice of a tensor seen as [rows, columns], stored row-major from byte `begin` of a file."""

    path: Path
    begin: int
    slice: TensorSlice

    @property
    def rows(self) -> tuple[int, int]:
        """First row, and first row past the slice."""
        return self.slice.offset[0], self.slice.end[0]

    @property
    def columns(self) -> tuple[int, int]:
        """First column, and first column past the slice."""
        return self.slice.offset[1], self.slice.end[1]

    def moved(self, rows: int) -> "FileSlice":
        """Return the same bytes, `rows` further down in their tensor."""
        (first, column), shape = self.slice.offset, self.slice.shape
        return FileSlice(self.path, self.begin, TensorSlice((first + rows, column), shape))


def as_matrix(part: TensorSlice) -> TensorSlice:
    """Return a slice of a tensor with one or two dimensions as a slice of [rows, columns]."""
    return part if len(part.shape) == 2 else TensorSlice((*part.offset, 0), (*part.shape, 1))


@dataclass(frozen=True)
class TensorSource:
    """A tensor in files. It is read as [rows, columns]: dimension 0, and all others flattened."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    slices: tuple[FileSlice, ...]

    @property
    def rows(self) -> int:
        """Length of dimension 0."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Values per row."""
        return prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def contiguous(self) -> bool:
        """True if every slice has whole rows."""
        return all(part.slice.shape[1] == self.columns for part in self.slices)

    def cut(self, first: int, count: int) -> Iterator[FileSlice]:
        """Yield the parts that are in rows [first, first + count)."""
        wanted = TensorSlice((first, 0), (count, self.columns))
        for part in self.slices:
            if shared := part.slice.intersection(wanted):
                skipped = (shared.offset[0] - part.slice.offset[0]) * shared.shape[1] * ITEM_BYTES[self.dtype]
                yield FileSlice(part.path, part.begin + skipped, shared)

    def check(self) -> "TensorSource":
        """Check that the slices cover the tensor and do not overlap, and return the source.

        Raises:
            ConversionError: they do not; names the tensor.
        """
        if len(self.slices) > _MAX_SLICES:
            raise ConversionError(f"{self.name}: stored in {len(self.slices)} parts; at most {_MAX_SLICES} are read")
        slices = sorted((part.slice for part in self.slices), key=lambda part: part.offset)
        for index, part in enumerate(slices):
            if part.end[0] > self.rows or part.end[1] > self.columns:
                raise ConversionError(f"{self.name}: a part of it is outside its shape {self.shape}")
            for other in slices[index + 1 :]:
                if other.offset[0] >= part.end[0]:
                    break
                if part.intersection(other):
                    raise ConversionError(f"{self.name}: two of its parts overlap")
        held, needed = sum(part.numel for part in slices), prod(self.shape)
        if held != needed:
            raise ConversionError(f"{self.name}: its parts hold {held} of {needed} values")
        return self

    def blocks(self, files: OpenFiles, limit: int = BLOCK_BYTES) -> Iterator[memoryview]:
        """Yield the tensor's bytes in order, whole rows of about `limit` bytes at a time.

        A block is valid until the next but one.
        """
        row_bytes = self.columns * ITEM_BYTES[self.dtype]
        step = max(1, limit // max(1, row_bytes))
        for first in range(0, self.rows, step):
            yield self.read_rows(files, first, min(first + step, self.rows))

    def read_rows(self, files: OpenFiles, first: int, last: int) -> memoryview:
        """Return the bytes of rows [first, last). They are valid until the next but one is read."""
        width = self.columns * ITEM_BYTES[self.dtype]
        block = files.buffer((last - first) * width)
        wanted = TensorSlice((first, 0), (last - first, self.columns))
        for part in self.slices:
            if shared := part.slice.intersection(wanted):
                self._read_slice(files, part, shared, block, first)
        return block

    def _read_slice(
        self, files: OpenFiles, part: FileSlice, shared: TensorSlice, block: memoryview, first: int
    ) -> None:
        """Read the rows `shared` of a slice into a block that begins at row `first`."""
        item = ITEM_BYTES[self.dtype]
        rows, width = shared.shape[0], self.columns * item
        part_width = shared.shape[1] * item
        at, row = part.begin + (shared.offset[0] - part.slice.offset[0]) * part_width, shared.offset[0] - first
        if part_width == width:
            files.read_into(part.path, at, block[row * width : (row + rows) * width])
            return
        values = np.empty((rows, part_width), np.uint8)
        files.read_into(part.path, at, memoryview(values).cast("B"))
        target = np.frombuffer(block, np.uint8).reshape(-1, width)
        begin = shared.offset[1] * item
        target[row : row + rows, begin : begin + part_width] = values


def stacked(name: str, parts: Sequence[StoredTensor], shape: tuple[int, ...], first: int = 0) -> TensorSource:
    """Return rows [first, first + shape[0]) of tensors that are concatenated along dimension 0, as a tensor of `shape`.

    A row of each part has as many bytes as one of `shape`; the parts may have any number of rows.
    """
    columns = prod(shape[1:])
    row_bytes = columns * ITEM_BYTES[parts[0].dtype]
    wanted = TensorSlice((first, 0), (shape[0], columns))
    slices, at = [], 0
    for part in parts:
        held = TensorSlice((at, 0), (part.shape[0], columns))
        if shared := held.intersection(wanted):
            begin = part.begin + (shared.offset[0] - at) * row_bytes
            slices.append(FileSlice(part.path, begin, shared.relative_to(wanted.offset)))
        at += part.shape[0]
    return TensorSource(name, parts[0].dtype, shape, tuple(slices)).check()


def composed(name: str, shape: tuple[int, ...], parts: Sequence[tuple[TensorSource, int, int]]) -> TensorSource:
    """Return a tensor of `shape` whose rows are those of other tensors, one part after the other.

    Args:
        parts: (tensor, first row, rows). A row of each has as many values as one of `shape`.

    Raises:
        ConversionError: the parts are of different types.
    """
    (dtype, *others) = dict.fromkeys(source.dtype for source, _, _ in parts)
    if others:
        raise ConversionError(f"{name}: its parts are {dtype} and {', '.join(others)}; convert all with one --dtype")
    slices, at = [], 0
    for source, first, count in parts:
        slices += [part.moved(at - first) for part in source.cut(first, count)]
        at += count
    return TensorSource(name, dtype, shape, tuple(slices)).check()


def cast(block: memoryview, dtype: str, to: str) -> memoryview:
    """Return a block's values in another type."""
    if dtype == to:
        return block
    import torch

    values = torch.frombuffer(block, dtype=getattr(torch, TORCH_NAMES[dtype])).to(getattr(torch, TORCH_NAMES[to]))
    return memoryview(values.view(torch.uint8).numpy()).cast("B")
