"""Verification of a checkpoint by all ranks of a run, which share the files and agree on the verdict."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_hybrid.base.errors import StorageError
from megatron_hybrid.base.storage import describe_failure
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError, Index
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.checkpoint.verification import Verify, file_sha256, find_damage, share_of_files
from megatron_hybrid.distributed.first_rank import on_first_rank
from megatron_hybrid.distributed.shared_progress import SharedProgress

PATIENCE_S = 30.0
"""A network file system may show another node's changes, or recover from an error, this much later."""


@dataclass(frozen=True)
class _Finding:
    """Result of one rank: other bytes than rank 0 sees, a file that it cannot read, or damaged files of its share."""

    disagreement: str | None = None
    unreadable: str | None = None
    damaged: tuple[str, ...] = ()


def find_damage_together(folder: Path, verify: Verify) -> str | None:
    """Return why a checkpoint cannot be used, the same text on every rank; None: it is as it was written.

    Every rank calls it, and hashes its share of the files.

    Raises:
        CheckpointError: on every rank alike, if ranks see different bytes: the checkpoint may be good.
        StorageError: on every rank alike, if a file cannot be read: the checkpoint may be good.
    """
    first = SharedProgress()
    problem, index_sha256 = on_first_rank(lambda: _readable(folder, lambda: _examine_index(folder, first)), first)
    if index_sha256 is None:
        return problem
    progress = SharedProgress()
    finding = _examine_share(folder, verify, index_sha256, progress)
    progress.finish()
    progress.wait()
    findings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    for rank, found in enumerate(findings):
        if found.disagreement:
            raise CheckpointError(
                f"rank {rank}: {found.disagreement}; all nodes must see the same run_dir: is it on a file system that all of "
                "them share?"
            )
        if found.unreadable:
            raise StorageError(f"rank {rank}: {found.unreadable}")
    suspects = {name: rank for rank, found in enumerate(findings) for name in found.damaged}
    return _confirm(folder, suspects) if suspects else None


def _readable[T](folder: Path, read: Callable[[], T]) -> T:
    """Return the result of `read`, which is called again for PATIENCE_S seconds while files cannot be read.

    Raises:
        StorageError: a file still cannot be read.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return read()
        except OSError as error:
            if time.monotonic() > deadline:
                remedy = "If the file is lost, remove the checkpoint's folder, and the run resumes from an earlier one"
                raise StorageError(f"{describe_failure(error, folder)}. {remedy}") from error
        time.sleep(0.5)


def _examine_index(folder: Path, progress: SharedProgress) -> tuple[str | None, str | None]:
    """Return why the index cannot be used, and its SHA-256 if it can."""
    try:
        read_index(folder).check_state(folder)
    except CheckpointError as error:
        return str(error), None
    return None, file_sha256(folder / INDEX, progress.advance)


def _examine_share(folder: Path, verify: Verify, index_sha256: str, progress: SharedProgress) -> _Finding:
    """Compare the index with rank 0's and this rank's share of the files with the index."""
    try:
        index = _wait_for_index(folder, index_sha256, progress)
        if verify == "sizes":
            return _Finding()
        share = share_of_files(index.all_files(), dist.get_rank(), dist.get_world_size())
        return _Finding(damaged=tuple(_readable(folder, lambda: find_damage(folder, index, share, progress.advance))))
    except CheckpointError as error:
        return _Finding(disagreement=str(error))
    except StorageError as error:
        return _Finding(unreadable=str(error))


def _wait_for_index(folder: Path, sha256: str, progress: SharedProgress) -> Index:
    """Return the index, when it is the one that rank 0 sees and all files have their sizes.

    Raises:
        CheckpointError: that does not happen in PATIENCE_S seconds.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            index = read_index(folder)
            if file_sha256(folder / INDEX, progress.advance) == sha256:
                return index
            problem = CheckpointError(f"{folder / INDEX} is another file than on rank 0")
        except (CheckpointError, OSError) as error:
            problem = CheckpointError(str(error))
        if time.monotonic() > deadline:
            raise problem
        time.sleep(0.5)


def _confirm(folder: Path, suspects: dict[str, int]) -> str:
    """Return the damage that rank 0 sees in these files, too.

    Raises:
        CheckpointError: rank 0 reads what was written, so that the file is good and the other rank reads it wrongly.
    """
    progress = SharedProgress()

    def look() -> dict[str, str]:
        return _readable(folder, lambda: find_damage(folder, read_index(folder), suspects, progress.advance))

    damage = on_first_rank(look, progress)
    for name, rank in suspects.items():
        if name not in damage:
            raise CheckpointError(
                f"rank {rank} reads other bytes from {folder / name} than rank 0, which reads what was written; check the memory "
                "and the network of its node"
            )
    more = f" ({len(damage)} files have changed)" if len(damage) > 1 else ""
    return f"{next(iter(damage.values()))}{more}"
