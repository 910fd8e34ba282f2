"""Changes to checkpoints that tests make, and jobs of several ranks on them."""

import errno
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.base.errors import StorageError, UserError
from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.checkpoint import shared_verification, verification, writer
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError, add_checksum
from megatron_hybrid.checkpoint.manager import CheckpointManager
from megatron_hybrid.checkpoint.writer import SlicedTensor
from megatron_hybrid.config.checkpoint import CheckpointConfig
from megatron_hybrid.distributed.shared_progress import SharedProgress


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a checkpoint's index and give it a valid checksum, as if it had been written that way."""
    content = json.loads((folder / INDEX).read_text())
    content.pop("sha256", None)
    change(content)
    (folder / INDEX).write_text(add_checksum(json.dumps(content, separators=(",", ":"))))


def make_earlier_version(folder: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Change a checkpoint's index and give it the form of earlier versions, which has no checksum."""
    content = json.loads((folder / INDEX).read_text())
    del content["sha256"], content["other_files"]
    change(content)
    (folder / INDEX).write_text(json.dumps(content | {"format": "megatron_hybrid/1"}))


def damage_seen(
    folder: str, patience_s: float = 5.0, unreadable: str | None = None, recovers: bool = False
) -> str | None:
    """Job of several ranks: return the damage of a checkpoint that the ranks find together, or why they refuse it.

    Args:
        folder: `{rank}` in it stands for the rank.
        unreadable: file whose hashing fails, as after the loss of a network file system.
        recovers: hashing it succeeds at the second attempt.
    """
    hash_file, attempts = verification.file_sha256, itertools.count()

    def fail(path: Path, progress: verification.Progress = lambda count: None) -> str:
        if path.name == unreadable and not (recovers and next(attempts)):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return hash_file(path, progress)

    patience = mock.patch.object(shared_verification, "PATIENCE_S", patience_s)
    hashes = (mock.patch.object(module, "file_sha256", fail) for module in (verification, shared_verification))
    with patience, next(hashes), next(hashes):
        try:
            return shared_verification.find_damage_together(Path(folder.format(rank=dist.get_rank())), "full")
        except CheckpointError as error:
            return f"refused: {error}"
        except StorageError as error:
            return f"unreadable: {error}"
        except UserError as error:
            return str(error)


def beats_while_others_work(seconds: float) -> int:
    """Job of several ranks: wait for the last rank, which works for some seconds; return the heartbeats of this rank."""
    progress, before = SharedProgress(), heartbeat.beats
    if dist.get_rank() == dist.get_world_size() - 1:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            progress.advance()
            time.sleep(0.05)
    progress.finish()
    progress.wait()
    return heartbeat.beats - before


class _OneTensor:
    """Stand-in for a collector: each rank saves one row of a tensor."""

    def shards(self) -> Iterator[SlicedTensor]:
        rank, size = dist.get_rank(), dist.get_world_size()
        yield SlicedTensor("w", (size, 3), TensorSlice((rank, 0), (1, 3)), torch.zeros(1, 3))


def save_that_fails(folder: str, background: bool) -> str:
    """Job of several ranks: save where rank 1's disk is full, and return the error. It must come after the same step."""
    manager = CheckpointManager(CheckpointConfig(async_save=background), Path(folder), _OneTensor(), {}, {})  # type: ignore[arg-type]
    if dist.get_rank() == 1:
        writer.save_file = _full_disk
    step = 0
    try:
        manager.save(1, {"step": 1}, {})
        for step in range(1, 200):  # noqa: B007 - reported below
            manager.check()
            time.sleep(0.01)
    except StorageError as error:
        return f"after step {step}: {error}"
    return "no error"


def _full_disk(tensors: Any, path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
