"""Writing a safetensors file tensor after tensor: the header first, since every size is known beforehand."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.safetensors_header import ITEM_BYTES
from megatron_hybrid.convert.source import OpenFiles, TensorSource, cast

_COPY_BYTES = 64 << 20
_NO_COPY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ETXTBSY, errno.EPERM}
"""Where the kernel cannot copy between the two files by itself."""
Progress = Callable[[int], None]


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: `open` finds its source when its turn comes, so that planning stays cheap."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    open: Callable[[], TensorSource]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def in_file_order(tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Wide types first, as safetensors' own writer does: then every tensor is aligned to its items."""
    return sorted(tensors, key=lambda t: -ITEM_BYTES[t.dtype])


def header_bytes(tensors: Sequence[OutputTensor]) -> bytes:
    """The length field and the header of a file that holds these tensors in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Hash:
    """SHA-256 on a second thread (hashing releases the interpreter's lock), one block behind the writing."""

    def __init__(self, wanted: bool):
        self._hash = hashlib.sha256() if wanted else None
        self._pool = ThreadPoolExecutor(1) if wanted else None
        self._last: Future | None = None

    def update(self, block) -> None:
        if self._hash and self._pool:
            self.wait()
            self._last = self._pool.submit(self._hash.update, block)

    def wait(self) -> None:
        if self._last:
            self._last.result()

    def hexdigest(self) -> str | None:
        self.wait()
        return self._hash.hexdigest() if self._hash else None

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()


def write_file(path: Path, tensors: Sequence[OutputTensor], progress: Progress, with_hash: bool) -> dict[str, object]:
    """Write one file and put it safely on disk.

    Args:
        progress: called with the bytes written since the last call.
        with_hash: also return the file's SHA-256. Without it, bytes that need no cast are copied by the kernel.

    Returns:
        {"bytes": size of the file, "sha256": hash or None}

    Raises:
        ConversionError: a source that cannot be read, or is not what was planned.
    """
    hashing = _Hash(with_hash)
    try:
        with open(path, "wb", buffering=0) as out, OpenFiles() as files:
            header = header_bytes(tensors)
            _write(out, header)
            hashing.update(header)
            for tensor in tensors:
                source = tensor.open()
                if source.shape != tensor.shape:
                    raise ConversionError(f"{tensor.name}: {source.name} is {source.shape}, {tensor.shape} was planned")
                if not with_hash and source.dtype == tensor.dtype and source.contiguous:
                    _copy(out, source, files, progress)
                    continue
                for block in source.blocks(files):
                    data = cast(block, source.dtype, tensor.dtype)
                    hashing.update(data)
                    _write(out, data)
                    progress(len(data))
            size = out.tell()
            os.fsync(out.fileno())
        return {"bytes": size, "sha256": hashing.hexdigest()}
    finally:
        hashing.close()


def _write(out, data) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _copy(out, source: TensorSource, files: OpenFiles, progress: Progress) -> None:
    """Copy whole rows without bringing them into this process, where the kernel can."""
    item_rows = source.nbytes // source.rows
    for box in sorted(source.boxes, key=lambda b: b.row):
        descriptor, at, left = files.descriptor(box.path), box.at, box.rows * item_rows
        while left:
            try:
                count = os.copy_file_range(descriptor, out.fileno(), min(left, _COPY_BYTES), offset_src=at)
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise
                buffer = memoryview(bytearray(min(left, _COPY_BYTES // 4)))
                files.read_into(box.path, at, buffer)
                _write(out, buffer)
                count = len(buffer)
            if count == 0:
                raise ConversionError(f"{box.path}: ends at byte {at}; was it changed while it was read?")
            at, left = at + count, left - count
            progress(count)
