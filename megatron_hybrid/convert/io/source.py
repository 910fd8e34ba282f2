"""Reading a stored tensor a block of rows at a time, wherever its parts lie.

Plain reads, not memory maps: a mapped file's pages count as resident memory, a 15 GB checkpoint's would all stay. torch is
imported where values are cast, not before: most conversions move bytes, and are done by the time it would be there.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from megatron_hybrid.checkpoint.format import boxes_of_range
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.safetensors_header import ITEM_BYTES, StoredTensor

TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""What weights may be stored as. Conversions keep F64 as F32."""
BLOCK_BYTES = 4 << 20
"""Read, cast, hashed and written at once: small enough to stay in a processor's cache from one to the next."""
_MAX_BOXES = 4096
"""Parts of one tensor; far more than there are ranks, few enough to compare all with all."""


class OpenFiles:
    """The files being read, a few at a time, and the memory they are read into."""

    def __init__(self, limit: int = 32):
        self._limit = limit
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._buffers = [bytearray(), bytearray(), bytearray()]

    def buffer(self, nbytes: int) -> memoryview:
        """Memory for a block, used again two blocks later: fresh memory would cost a page fault every 4 KiB."""
        memory = self._buffers.pop(0)
        if len(memory) < nbytes:
            memory = bytearray(nbytes)
        self._buffers.append(memory)
        return memoryview(memory)[:nbytes]

    def descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) >= self._limit:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(path)
        return self._open[path]

    def read_into(self, path: Path, at: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `at`.

        Raises:
            ConversionError: the file has become shorter than its header said.
        """
        descriptor, done = self.descriptor(path), 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], at + done)
            if count == 0:
                raise ConversionError(f"{path}: ends at byte {at + done}; was it changed while it was read?")
            done += count

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass(frozen=True)
class StoredBox:
    """Rows [row, row + rows) and columns [column, column + columns) of a tensor, row-major from byte `at` of a file."""

    path: Path
    at: int
    row: int
    rows: int
    column: int
    columns: int


def flattened_range(box: StoredBox, item: int, start: int, stop: int) -> list[StoredBox]:
    """Elements [start, stop) of the flattened box, which alone lie at `box.at`."""
    parts, at = [], box.at
    for row, column, rows, columns in boxes_of_range(start, stop, box.columns):
        parts.append(StoredBox(box.path, at, box.row + row, rows, box.column + column, columns))
        at += rows * columns * item
    return parts


@dataclass(frozen=True)
class TensorSource:
    """A tensor seen as [rows, columns]: dimension 0, and all the others flattened."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[StoredBox, ...]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def contiguous(self) -> bool:
        """Whether every box has whole rows."""
        return all(box.columns == self.columns for box in self.boxes)

    def check(self) -> "TensorSource":
        """The boxes cover the tensor, each part once.

        Raises:
            ConversionError: names the tensor.
        """
        if len(self.boxes) > _MAX_BOXES:
            raise ConversionError(f"{self.name}: stored in {len(self.boxes)} parts; at most {_MAX_BOXES} are read")
        boxes = sorted(self.boxes, key=lambda b: (b.row, b.column))
        for index, box in enumerate(boxes):
            if box.row + box.rows > self.rows or box.column + box.columns > self.columns:
                raise ConversionError(f"{self.name}: a part of it lies outside its shape {self.shape}")
            for other in boxes[index + 1 :]:
                if other.row >= box.row + box.rows:
                    break
                if other.column < box.column + box.columns and box.column < other.column + other.columns:
                    raise ConversionError(f"{self.name}: two of its parts overlap")
        held, needed = sum(b.rows * b.columns for b in boxes), prod(self.shape)
        if held != needed:
            raise ConversionError(f"{self.name}: its parts hold {held} of {needed} values")
        return self

    def blocks(self, files: OpenFiles, limit: int = BLOCK_BYTES) -> Iterator[memoryview]:
        """The tensor's bytes in order, in pieces of whole rows of about `limit` bytes; one is good until the next but one."""
        row_bytes = self.columns * ITEM_BYTES[self.dtype]
        step = max(1, limit // max(1, row_bytes))
        for first in range(0, self.rows, step):
            yield self._read_rows(files, first, min(first + step, self.rows))

    def _read_rows(self, files: OpenFiles, first: int, last: int) -> memoryview:
        item = ITEM_BYTES[self.dtype]
        width = self.columns * item
        whole = files.buffer((last - first) * width)
        for box in self.boxes:
            lo, hi = max(first, box.row), min(last, box.row + box.rows)
            if lo >= hi:
                continue
            box_width = box.columns * item
            at = box.at + (lo - box.row) * box_width
            if box.columns == self.columns:
                files.read_into(box.path, at, whole[(lo - first) * width : (hi - first) * width])
                continue
            part = np.empty((hi - lo, box_width), np.uint8)
            files.read_into(box.path, at, memoryview(part).cast("B"))
            target = np.frombuffer(whole, np.uint8).reshape(last - first, width)
            target[lo - first : hi - first, box.column * item : box.column * item + box_width] = part
        return whole


def stacked(name: str, parts: list[StoredTensor], shape: tuple[int, ...], first: int = 0) -> TensorSource:
    """Rows [first, first + shape[0]) of the parts laid one after another along dimension 0, as a tensor of `shape`.

    The parts' bytes a row must be those of `shape`; the parts may be of any number of rows.
    """
    columns = prod(shape[1:])
    row_bytes = columns * ITEM_BYTES[parts[0].dtype]
    boxes, at = [], 0
    for part in parts:
        rows = part.shape[0]
        lo, hi = max(first, at), min(first + shape[0], at + rows)
        if lo < hi:
            boxes.append(StoredBox(part.path, part.begin + (lo - at) * row_bytes, lo - first, hi - lo, 0, columns))
        at += rows
    return TensorSource(name, parts[0].dtype, shape, tuple(boxes)).check()


def cast(block: memoryview, dtype: str, to: str) -> memoryview:
    """A block's values in another type."""
    if dtype == to:
        return block
    import torch

    values = torch.frombuffer(block, dtype=getattr(torch, TORCH_NAMES[dtype])).to(getattr(torch, TORCH_NAMES[to]))
    return memoryview(values.view(torch.uint8).numpy()).cast("B")
