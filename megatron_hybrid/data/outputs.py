"""Output files of preprocessing: checks of existing files, and replacement of whole datasets.

A dataset is PREFIX.bin, PREFIX.idx and PREFIX.json. A job writes it in the work folder PREFIX.partial, which is also
its lock (`work_folder`), and renames the three files when all datasets of the job are complete.

- `refuse_outputs`: check that the final names are free, or hold a dataset of this tool.
- `Outputs`: the datasets of one job, published together.
"""

import os
import re
import stat
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.indexed import MAGIC
from megatron_hybrid.data.work_folder import SUFFIXES, WorkFolder

FileId = tuple[int, int]
"""Device and inode, which are the same for all names of a file."""

_SUMMARY = re.compile(
    rb'\{\n  "documents": \d+,\n  "tokens": (\d+),\n  "max_token": -?\d+,\n  "dtype": "(u?int\d+)",\n  "tokenizer": '
)
"""Beginning of every PREFIX.json that this tool wrote. Compared as bytes: another JSON file may be large."""


def file_id(info: os.stat_result) -> FileId:
    """Return the identity of a file, which is equal for all its names."""
    return info.st_dev, info.st_ino


def refuse_outputs(prefixes: Sequence[str], overwrite: bool, inputs: Collection[FileId] = ()) -> None:
    """Check every file that a job would write or replace.

    Raises:
        DataError: an output is an input, or exists and is no dataset of this tool, or exists without overwrite.
    """
    for prefix in prefixes:
        existing = [prefix + suffix for suffix in sorted(SUFFIXES) if os.path.lexists(prefix + suffix)]
        for path in existing + _files_in(f"{prefix}.partial"):
            _refuse_input(path, inputs)
        if reason := _foreign(prefix, existing):
            raise DataError(
                f"{existing[0]} exists and is not replaced, with or without --overwrite: {reason}. "
                "Give another output prefix, or move the file away"
            )
        if existing and not overwrite:
            raise DataError(f"{existing[0]} exists: give another output prefix, or --overwrite")


def _files_in(folder: str) -> list[str]:
    return [entry.path for entry in os.scandir(folder)] if os.path.isdir(folder) else []


def _refuse_input(path: str, inputs: Collection[FileId]) -> None:
    if os.path.exists(path) and file_id(os.stat(path)) in inputs:
        raise DataError(f"{path} is an input and would be an output: give another output prefix")


def _foreign(prefix: str, existing: Sequence[str]) -> str | None:
    """Return why the existing files are no dataset of this tool; None if they are, or if there are none."""
    for path in existing:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return "it is a link" if os.path.islink(path) else "it is not a regular file"
    if not existing:
        return None
    if f"{prefix}.json" not in existing:
        return f"there is no {prefix}.json, so another program wrote it"
    summary = _SUMMARY.match(_head(f"{prefix}.json"))
    if summary is None:
        return f"{prefix}.json is not a summary of this tool"
    num_bytes = int(summary[1]) * np.dtype(summary[2].decode()).itemsize
    if f"{prefix}.bin" in existing and os.path.getsize(f"{prefix}.bin") != num_bytes:
        return f"{prefix}.bin does not have the {num_bytes} bytes that {prefix}.json states"
    if f"{prefix}.idx" in existing and not _head(f"{prefix}.idx").startswith(MAGIC):
        return f"{prefix}.idx is not the index of a dataset"
    return None


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1024)


class Outputs:
    """Datasets of one job. They are locked on entry, and published together or not at all."""

    def __init__(self, prefixes: Sequence[str], overwrite: bool, say: Callable[[str], None]):
        """Create the outputs. say: receives one sentence if the work folder of a dead process is taken over."""
        self._prefixes, self._overwrite, self._say = prefixes, overwrite, say
        self._folders: dict[str, WorkFolder] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Outputs":
        with ExitStack() as stack:
            for prefix in self._prefixes:
                Path(prefix).parent.mkdir(parents=True, exist_ok=True)
                self._folders[prefix] = stack.enter_context(WorkFolder(prefix, self._finish_replacement, self._say))
            refuse_outputs(self._prefixes, self._overwrite)  # another job may have ended since the first check
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def working_prefix(self, prefix: str) -> str:
        """Return the prefix under which to write the dataset until it is published."""
        return self._folders[prefix].dataset

    def publish(self) -> None:
        """Give all datasets their names. After an error or an interrupt, the datasets of before are back in place.

        If the process is killed in between, the next job with the same prefix completes the replacement.
        """
        refuse_outputs(self._prefixes, self._overwrite)  # hours may have passed
        folders = self._folders.values()
        try:
            for folder in folders:
                folder.mark_complete()
            for folder in folders:
                folder.move_in()
        except BaseException:
            for folder in folders:
                folder.move_back()
            raise
        for folder in folders:
            folder.mark_published()

    @staticmethod
    def _finish_replacement(folder: WorkFolder) -> None:
        refuse_outputs([folder.prefix], overwrite=True)
        folder.move_in()
