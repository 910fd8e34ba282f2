"""The writer of checkpoints. Each rank writes its files into a temporary folder; rank 0 checks the folder and renames it.

A rank's `rank-XXXXX.json` next to its files is its part of the index. Ranks tell each other whether they have written
(checkpoint/agreement.py).
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.base.errors import storage_errors
from megatron_hybrid.base.synced_files import replace_synced, sync
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError, Index, StoredSlice, TensorEntry
from megatron_hybrid.checkpoint.index_file import read_index, tensors_from_json
from megatron_hybrid.checkpoint.removal import REPLACED, remove_folder
from megatron_hybrid.checkpoint.verification import file_sha256

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

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


def write_rank(folder: Path, rank: int, tensors: Iterable[SlicedTensor], extra: dict[str, torch.Tensor]) -> None:
    """Write one rank's tensors and then, when they are safe on disk, its part of the index.

    Args:
        tensors: taken one by one; their data is released file by file.
        extra: tensors of this rank alone (its random state), stored in the first file under `local.NAME`.

    Raises:
        StorageError: the disk is full, read-only or failing.
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
        facts[file] = _write_file(folder / file, entries)
        entries.clear()
        group.clear()
    part = {"files": facts, "tensors": {name: entry.as_json() for name, entry in index.items()}}
    text = json.dumps(part, separators=(",", ":")).encode()
    with storage_errors(folder, len(text)):
        replace_synced(folder / f"rank-{rank:05d}.json", text)


def _write_file(path: Path, entries: dict[str, torch.Tensor]) -> dict[str, int | str]:
    """Write a file of tensors, sync it to disk, and return its size and hash."""
    with storage_errors(path, sum(tensor.nbytes for tensor in entries.values())):
        try:
            save_file(entries, path)
        except SafetensorError as error:  # of a write; its text ends with the system's error number
            number = _OS_ERROR.search(str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        sync(path)
        return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


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


def finish(folder: Path, target: Path, index: Index, world_size: int, timeout_s: float = 60) -> None:
    """Write the index from every rank's part, check the checkpoint, and rename the folder to `target`.

    Args:
        timeout_s: a network file system may show the files of other nodes this much later.

    Raises:
        CheckpointError: a rank's part is not in the folder, or tensors are incomplete.
        StorageError: the disk is full, read-only or failing.
    """
    parts = [folder / f"rank-{rank:05d}.json" for rank in range(world_size)]
    _wait_for(parts, timeout_s)
    with storage_errors(folder):
        for part in parts:
            data = json.loads(part.read_text())
            index.files |= data["files"]
            index.merge(tensors_from_json(data["tensors"]))
        replace_synced(folder / INDEX, index.dump().encode())
        read_index(folder)
        for part in parts:
            part.unlink()
        sync(folder)
        _publish(folder, target)


def _wait_for(parts: list[Path], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while missing := [part for part in parts if not part.exists()]:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{missing[0].parent}: {', '.join(part.stem for part in missing[:4])} of {len(parts)} ranks cannot be seen there; "
                "put run_dir on a file system that all nodes share"
            )
        time.sleep(0.02)


def _publish(folder: Path, target: Path) -> None:
    """Rename a complete folder to `target`. If this is interrupted, `remove_remains` restores what was there before."""
    replaced = target.with_name(REPLACED + target.name)
    if os.path.lexists(target):  # an earlier attempt at the same step
        remove_folder(replaced)
        os.replace(target, replaced)
    os.replace(folder, target)
    sync(target.parent)
    with suppress(OSError):  # the checkpoint is in place, and the next start removes the replaced one
        remove_folder(replaced)


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

    @property
    def in_progress(self) -> bool:
        """True from `start` to `wait`."""
        return self._thread is not None

    @property
    def ended(self) -> bool:
        """True if the last write has ended."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the write in progress, and raise its error if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
