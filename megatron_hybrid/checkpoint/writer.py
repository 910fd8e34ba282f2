"""The writer of checkpoints. Each rank writes its files into a temporary folder; rank 0 checks the folder and renames it.

Finishing needs no collective: a rank is done when its `rank-XXXXX.json` is next to its files, and rank 0 waits for these
files. Writing can therefore run in a background thread.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.checkpoint.folders import DELETING
from megatron_hybrid.checkpoint.format import (
    INDEX,
    CheckpointError,
    Index,
    StoredSlice,
    TensorEntry,
    read_index,
    tensors_from_json,
)

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}

FILE_BYTES = 4 << 30
"""A rank begins another file after this many bytes. Tensors copied from a device stay in host memory until then."""


@dataclass
class SlicedTensor:
    """A slice of a tensor to write. `data` is the slice, or elements [start, stop) of the flattened slice."""

    name: str
    tensor_shape: tuple[int, ...]
    slice: TensorSlice
    data: torch.Tensor
    range: tuple[int, int] | None = None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_rank(folder: Path, rank: int, tensors: Iterable[SlicedTensor], extra: dict[str, torch.Tensor]) -> None:
    """Write one rank's tensors and then, when they are safe on disk, its part of the index.

    Args:
        tensors: taken one by one; their data is released file by file.
        extra: tensors of this rank alone (its random state), stored in the first file under `local.NAME`.
    """
    index: dict[str, TensorEntry] = {}
    facts = {}
    entries = {f"local.{name}": tensor for name, tensor in extra.items()}
    for number, group in enumerate(_by_file(tensors)):
        file = f"rank-{rank:05d}{f'-{number:03d}' if number else ''}.safetensors"
        for tensor in group:
            entry = f"{len(entries)}/{tensor.name}"
            entries[entry] = tensor.data.contiguous()
            known = index.setdefault(tensor.name, TensorEntry(_DTYPE_NAMES[tensor.data.dtype], tensor.tensor_shape))
            known.slices.append(StoredSlice(file, entry, tensor.slice, tensor.range))
        save_file(entries, folder / file)
        entries.clear()
        group.clear()
        _sync(folder / file)
        facts[file] = {"bytes": (folder / file).stat().st_size, "sha256": file_sha256(folder / file)}
    part = {"files": facts, "tensors": {name: entry.as_json() for name, entry in index.items()}}
    _write_text(folder / f"rank-{rank:05d}.json", json.dumps(part, separators=(",", ":")))


def _by_file(tensors: Iterable[SlicedTensor]) -> Iterator[list[SlicedTensor]]:
    """Group tensors into lists of at least FILE_BYTES. The caller empties each list. The first one may be empty."""
    held: list[SlicedTensor] = []
    size = 0
    for tensor in tensors:
        if size >= FILE_BYTES:
            yield held
            held, size = [], 0
        held.append(tensor)
        size += tensor.data.nbytes
    yield held


def finish(folder: Path, target: Path, index: Index, world_size: int, timeout_s: float = 1800) -> None:
    """Wait for every rank's part, write the index, check the checkpoint, and rename the folder to `target`.

    Raises:
        CheckpointError: a rank's part did not appear in time, or tensors are incomplete. `folder` is kept for inspection.
    """
    deadline = time.monotonic() + timeout_s
    parts = [folder / f"rank-{rank:05d}.json" for rank in range(world_size)]
    while missing := [part.stem for part in parts if not part.exists()]:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{folder}: {', '.join(missing[:4])} of {world_size} ranks wrote nothing in {timeout_s:.0f} s; is the disk full?"
            )
        time.sleep(0.02)
    for part in parts:
        data = json.loads(part.read_text())
        index.files |= data["files"]
        index.merge(tensors_from_json(data["tensors"]))
    _write_text(folder / INDEX, index.dump())
    read_index(folder)
    check_complete(index, folder)
    for part in parts:
        part.unlink()
    replaced = target.with_name(DELETING + target.name)
    if target.exists():  # an earlier attempt at the same step
        os.replace(target, replaced)
    os.replace(folder, target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def check_complete(index: Index, folder: Path) -> None:
    """Check that the slices of every tensor hold as many values as the tensor.

    Raises:
        CheckpointError: names the first tensor whose slices do not.
    """
    for name, held, total in index.incomplete():
        raise CheckpointError(f"{folder}: {name} holds {held} values of {total}")


class AsyncWrites:
    """A background thread that writes one checkpoint at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Run `work()` in the background, once the write in progress has ended."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - handed to the training thread by wait()
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write in progress, and raise its error if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of a write that failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
