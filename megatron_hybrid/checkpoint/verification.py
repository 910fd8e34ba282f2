"""Comparison of a checkpoint's files with the hashes in its index, at disk speed.

Hashing releases Python's GIL: on 8 cores, 8 threads hash about 12 GB/s. Ranks share the files (checkpoint/agreement.py).
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from megatron_hybrid.checkpoint.format import CheckpointError, Index

Verify = Literal["full", "sizes"]
Progress = Callable[[int], None]
_BLOCK_BYTES = 4 << 20
_THREADS = 16


def file_sha256(path: Path, progress: Progress = lambda count: None) -> str:
    """Return the SHA-256 of a file. progress: called with the number of bytes read since the last call."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            progress(count)
    return digest.hexdigest()


def find_damage(
    folder: Path, index: Index, names: Iterable[str] | None = None, progress: Progress = lambda count: None
) -> dict[str, str]:
    """Return a line for each file that is not as it was written, by its name.

    Args:
        names: files to compare; None: all of them. Files without a recorded hash are not read.

    Raises:
        OSError: a file cannot be read. That says nothing about its content.
    """
    known = index.all_files()
    hashes = {name: known[name].get("sha256") for name in (known if names is None else names)}

    def problem(name: str) -> str | None:
        try:
            found = file_sha256(folder / name, progress)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            return f"{folder / name}: cannot be read: {error.strerror}"
        if found == hashes[name]:
            return None
        return f"{folder / name}: its SHA-256 is {found}; {hashes[name]!s:.80} was written: the file has changed"

    recorded = [name for name, sha256 in hashes.items() if sha256]
    with ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0)))) as pool:
        lines = zip(recorded, pool.map(problem, recorded), strict=True)
        return {name: line for name, line in lines if line}


def share_of_files(files: Mapping[str, Mapping[str, Any]], rank: int, size: int) -> list[str]:
    """Return the files that one of several ranks compares. The largest come first, each for the rank with the fewest bytes."""
    loads, mine = [0] * size, []
    for name in sorted(files, key=lambda name: (-files[name]["bytes"], name)):
        chosen = loads.index(min(loads))
        loads[chosen] += files[name]["bytes"]
        if chosen == rank:
            mine.append(name)
    return mine


def refuse_damage(folder: Path, damage: Mapping[str, str]) -> None:
    """Raise a CheckpointError if `find_damage` found any."""
    if damage:
        more = f" ({len(damage)} files have changed)" if len(damage) > 1 else ""
        raise CheckpointError(f"{folder}: damaged: {next(iter(damage.values()))}{more}; use an earlier checkpoint")


def warn_unchecked(folder: Path, index: Index) -> None:
    """Print what no checksum of a checkpoint protects, if there is anything."""
    if unchecked := index.unchecked():
        print(f"warning: {folder}: {unchecked}", file=sys.stderr)
