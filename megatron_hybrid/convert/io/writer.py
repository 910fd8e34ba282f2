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
from megatron_hybrid.convert.source import BLOCK_BYTES, OpenFiles, TensorSource, cast

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
    """SHA-256 of a file while it is written, on a second thread: hashing and reading release the interpreter's lock."""

    def __init__(self):
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._files = OpenFiles()
        self._pending: list[Future] = []

    def block(self, data) -> None:
        """Hash a block; it must stay as it is until the next but one."""
        self._wait()
        self._pending.append(self._pool.submit(self._hash.update, data))

    def region(self, path: Path, at: int, count: int) -> None:
        """Hash bytes that the kernel copies from `path`."""
        self._pending.append(self._pool.submit(self._region, path, at, count))

    def _region(self, path: Path, at: int, count: int) -> None:
        while count:
            buffer = self._files.buffer(min(count, BLOCK_BYTES))
            self._files.read_into(path, at, buffer)
            self._hash.update(buffer)
            at, count = at + len(buffer), count - len(buffer)

    def _wait(self) -> None:
        while self._pending:
            self._pending.pop(0).result()

    def hexdigest(self) -> str:
        self._wait()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.close()


Settle = Callable[[], dict[str, object]]


def write_file(path: Path, tensors: Sequence[OutputTensor], progress: Progress, with_hash: bool) -> Settle:
    """Write one file.

    Bytes that need no cast are copied by the kernel.

    Args:
        progress: called with the bytes written since the last call.
        with_hash: find the file's SHA-256 too.

    Returns:
        What is to be called before the file counts, on any thread: it waits until the file is hashed and safely on disk, and
        returns {"bytes": size of the file, "sha256": hash or None}.

    Raises:
        ConversionError: a source that cannot be read, or is not what was planned.
    """
    hashing = _Hash() if with_hash else None
    out = open(path, "wb", buffering=0)  # noqa: SIM115 - closed when it has settled
    try:
        with OpenFiles() as files:
            header = header_bytes(tensors)
            _write(out, header)
            if hashing:
                hashing.block(header)
            for tensor in tensors:
                source = tensor.open()
                if source.shape != tensor.shape:
                    raise ConversionError(f"{tensor.name}: {source.name} is {source.shape}, {tensor.shape} was planned")
                if source.dtype == tensor.dtype and source.contiguous:
                    _copy(out, source, files, hashing, progress)
                    continue
                for block in source.blocks(files):
                    data = cast(block, source.dtype, tensor.dtype)
                    if hashing:
                        hashing.block(data)
                    _write(out, data)
                    progress(len(data))
    except BaseException:
        _close(out, hashing)
        raise

    def settle() -> dict[str, object]:
        try:
            digest = hashing.hexdigest() if hashing else None
            os.fsync(out.fileno())
            return {"bytes": out.tell(), "sha256": digest}
        finally:
            _close(out, hashing)

    return settle


def _close(out, hashing: _Hash | None) -> None:
    if hashing:
        hashing.close()
    out.close()


def _write(out, data) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _copy(out, source: TensorSource, files: OpenFiles, hashing: _Hash | None, progress: Progress) -> None:
    """Copy whole rows without bringing them into this process, where the kernel can."""
    item_rows = source.nbytes // source.rows
    for box in sorted(source.boxes, key=lambda b: b.row):
        descriptor, at, left = files.descriptor(box.path), box.at, box.rows * item_rows
        if hashing:
            hashing.region(box.path, at, left)
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
