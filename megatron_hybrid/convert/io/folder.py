"""Access to folders of unknown origin: only their own regular files, only unambiguous JSON.

A snapshot of the Hugging Face cache holds links to `../../blobs/HASH`. These files count as the folder's own.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

from megatron_hybrid.base.json_text import read_json_object
from megatron_hybrid.base.lfs import refuse_lfs_pointer
from megatron_hybrid.convert.errors import ConversionError

MAX_JSON_BYTES = 16 << 20
"""The index of a model with 100,000 tensors has about 10 MB. A larger file is an attempt to exhaust memory."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


def regular_file(folder: Path, name: str) -> Path:
    """Return the path of a file in `folder` itself.

    Raises:
        ConversionError: a path instead of a name, no such file, a link out of the folder, a device, a pipe, or a Git LFS
            pointer.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConversionError(
            f"{folder}: {name!r:.200} is not the name of a file in this folder; nothing outside it is read"
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError):
        raise ConversionError(f"{path}: there is no such file") from None
    if real.parent != folder.resolve() and not _is_cached_blob(folder.resolve(), real):
        raise ConversionError(
            f"{path}: a link to {real}, outside the folder, is not followed; copy the files themselves into one folder "
            "(or `hf download REPOSITORY --local-dir DIR`)"
        )
    if not stat.S_ISREG(mode):
        raise ConversionError(f"{path}: not a regular file")
    refuse_lfs_pointer(path, ConversionError)
    return path


def _is_cached_blob(folder: Path, real: Path) -> bool:
    """Return whether `folder` is in REPOSITORY/snapshots/REVISION of a Hugging Face cache, and `real` in its blobs."""
    return any(parent.name == "snapshots" and real.parent == parent.parent / "blobs" for parent in folder.parents)


def has_file(folder: Path, name: str) -> bool:
    """Return whether the folder has an entry of this name, of any kind."""
    return os.path.lexists(folder / name)


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ConversionError: not JSON, not an object, a key occurs twice, or the file is larger than `limit` bytes.
    """
    return read_json_object(path, limit, ConversionError)
