"""Files that the processes of a run compute once and share, in the run's folder.

A result is arrays (`NAME.ARRAY.npy`) and facts (`NAME.json`). The facts are written last, so that a result whose facts exist
is complete. Two processes that compute the same result write the same bytes, and the later one replaces the files.
"""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.file_array import FileArray, open_npy

_MOST_OPEN = 256  # files per process: a source may have thousands of files


class WorkFiles:
    """Results in a folder, by name."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def facts(self, name: str) -> dict[str, Any] | None:
        """Return the facts of a result; None if it is not there or not complete."""
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # computed again
        return found if isinstance(found, dict) else None

    def required(self, name: str) -> dict[str, Any]:
        """Return the facts of a result that another process has written.

        Raises:
            DataError: it is not there.
        """
        found = self.facts(name)
        if found is None:
            raise DataError(
                f"{self.folder / name}.json is missing or damaged: the run's folder must be on a file system that all nodes share"
            )
        return found

    def array(self, name: str, array: str) -> FileArray:
        """Return an array of a result, which is read from the file as it is used.

        Raises:
            DataError: it cannot be read.
        """
        return _open(str(self._path(name, array)))

    def write(self, name: str, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        """Write a result.

        Raises:
            DataError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for array, values in arrays.items():
                path = self._path(name, array)
                partial = path.with_suffix(f".{os.getpid()}.partial")
                with partial.open("wb") as file:
                    np.save(file, values, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            partial = self.folder / f"{name}.{os.getpid()}.partial"
            partial.write_text(json.dumps(facts), encoding="utf-8")
            partial.replace(self.folder / f"{name}.json")
        except OSError as error:
            raise DataError(
                f"{error.filename or self.folder}: cannot be written: {error.strerror}; the run needs a folder it can write"
            ) from error

    def _path(self, name: str, array: str) -> Path:
        return self.folder / f"{name}.{array}.npy"


@lru_cache(_MOST_OPEN)
def _open(path: str) -> FileArray:
    try:
        return open_npy(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}. The run's folder must be on a file system that all nodes share; remove "
            f"{Path(path).parent} to compute its files again"
        ) from error


def digest(*values: object) -> str:
    """Return a name for values that are equal in every process (32 hexadecimal digits)."""
    return hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()


def file_state(path: str) -> tuple[str, int, int]:
    """Return what changes when a file does: absolute path, size and modification time.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns
