"""Failures of file systems: what to say about a disk that is full, read-only or failing."""

import errno
import os
import shutil
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "make room on this file system",
    errno.EDQUOT: "remove files or ask for a larger quota",
    errno.EROFS: "mount the file system for writing, or choose a folder on another one",
    errno.EIO: "check the device or the network file system (dmesg), or choose a folder on another one",
    errno.ESTALE: "mount the network file system again",
    errno.EACCES: "give this user permission to read and write there",
    errno.EPERM: "give this user permission to read and write there",
}
_OF_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
FAILURES = frozenset(_REMEDIES)
"""Error numbers of file systems that no change of the program's input can cause."""


def describe_failure(error: OSError, path: str | os.PathLike[str], needed: int | None = None) -> str:
    """Return one line about a failed read or write: path, reason, needed and free bytes, and the remedy.

    Args:
        path: named if the error names no file.
        needed: bytes that the write takes; None: unknown.
    """
    where = Path(os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else path)
    room = _room(where, needed) if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    remedy = _REMEDIES.get(error.errno or 0, "check the file system")
    failed = "cannot be written" if error.errno in _OF_WRITES else "cannot be read or written"
    return f"{where}: {failed}: {error.strerror or error}{room}; {remedy}"


def _room(path: Path, needed: int | None) -> str:
    wanted = f"{needed:,} bytes are needed" if needed is not None else ""
    for folder in (path, *path.absolute().parents):
        try:
            free = f"{shutil.disk_usage(folder).free:,} bytes are free"
        except OSError:  # such as a file that was never created
            continue
        return f" ({wanted}, {free})" if wanted else f" ({free})"
    return f" ({wanted})" if wanted else ""
