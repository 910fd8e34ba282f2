"""Access to folders of unknown origin: only their own regular files, only unambiguous JSON.

A snapshot of the Hugging Face cache holds links to `../../blobs/HASH`. These files count as the folder's own.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

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
        ConversionError: as `parse_json`, or the file is larger than `limit` bytes.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ConversionError(f"{path}: larger than {limit >> 20} MiB; no model has such a file")
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse UTF-8 JSON that is an object.

    Raises:
        ConversionError: not JSON, not an object, or a key occurs twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConversionError(f"{where}: {twice!r:.200} occurs twice")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except ConversionError:
        raise
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and numbers of thousands of digits
        raise ConversionError(f"{where}: not readable JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{where}: not a JSON object")
    return value
