"""Writing a checkpoint: every rank its files, into a temporary folder that is checked and renamed when all are there.

No collective is needed to finish: a rank's part is done when its `rank-XXXXX.json` stands beside its files, and rank 0
waits for all of them. So the whole of it can run in a background thread.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_hybrid.checkpoint.folders import DELETING
from megatron_hybrid.checkpoint.format import (
    INDEX,
    CheckpointError,
    Index,
    Shard,
    TensorEntry,
    read_index,
    tensors_from_json,
)

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}

FILE_BYTES = 4 << 30
"""After which a rank begins another file: what it takes from a device is in host memory until its file is written."""


@dataclass
class SavedShard:
    """One shard to write: `data` is the box, or the flattened range of it."""

    name: str
    tensor_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    data: torch.Tensor
    range: tuple[int, int] | None = None


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_rank(folder: Path, rank: int, shards: Iterable[SavedShard], extra: dict[str, torch.Tensor]) -> None:
    """Write one rank's tensors and, when they are safe on disk, its part of the index.

    Args:
        shards: taken one by one, and let go file by file.
        extra: tensors of this rank alone (its random state), kept in the first file under `local.NAME`.
    """
    tensors: dict[str, TensorEntry] = {}
    facts = {}
    entries = {f"local.{name}": tensor for name, tensor in extra.items()}
    for number, described in enumerate(_by_file(shards)):
        file = f"rank-{rank:05d}{f'-{number:03d}' if number else ''}.safetensors"
        for shard in described:
            entry = f"{len(entries)}/{shard.name}"
            entries[entry] = shard.data.contiguous()
            known = tensors.setdefault(shard.name, TensorEntry(_DTYPE_NAMES[shard.data.dtype], shard.tensor_shape))
            known.shards.append(Shard(file, entry, shard.offset, shard.shape, shard.range))
        save_file(entries, folder / file)
        entries.clear()
        described.clear()
        _sync(folder / file)
        facts[file] = {"bytes": (folder / file).stat().st_size, "sha256": file_sha256(folder / file)}
    part = {"files": facts, "tensors": {name: asdict(entry) for name, entry in tensors.items()}}
    _write_text(folder / f"rank-{rank:05d}.json", json.dumps(part, separators=(",", ":")))


def _by_file(shards: Iterable[SavedShard]) -> Iterator[list[SavedShard]]:
    """Lists of FILE_BYTES or a shard more, which the caller empties; the first one may be empty."""
    held: list[SavedShard] = []
    size = 0
    for shard in shards:
        if size >= FILE_BYTES:
            yield held
            held, size = [], 0
        held.append(shard)
        size += shard.data.nbytes
    yield held


def finish(folder: Path, target: Path, index: Index, world_size: int, timeout_s: float = 1800) -> None:
    """Wait for every rank's part, write the index, check that the whole can be read, and rename the folder to `target`.

    Raises:
        CheckpointError: a rank's part did not appear in time, or the whole is not complete; `folder` is left for a look.
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
    """Every tensor's shards hold as many values as the tensor has.

    Raises:
        CheckpointError: names the first that does not.
    """
    for name, entry in index.tensors.items():
        held, total = sum(shard.numel for shard in entry.shards), torch.Size(entry.shape).numel()
        if held != total:
            raise CheckpointError(f"{folder}: {name} holds {held} values of {total}")


class AsyncWrites:
    """One checkpoint at a time, written by a background thread."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work) -> None:
        """Run `work()` in the background, after what is still being written."""
        self.wait()

        def run():
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - handed to the training thread by wait()
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write under way; raise what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in a write, if anything did."""
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
