"""Git LFS pointers: the small text files that a clone without git-lfs leaves in place of large files.

- `is_lfs_pointer`: test bytes that were read already.
- `refuse_lfs_pointer`: test a file before it is parsed.

Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from pathlib import Path

from megatron_hybrid.base.errors import UserError

POINTER_BYTES = 1024
"""Pointers are shorter than this."""
LFS_REMEDY = "a Git LFS pointer, not the file itself: run `git lfs install` and `git lfs pull` in its repository"
_FIRST_LINES = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


def is_lfs_pointer(content: bytes) -> bool:
    """Return True if the content of a file, or its first POINTER_BYTES bytes, is a Git LFS pointer."""
    return content.startswith(_FIRST_LINES) and len(content) < POINTER_BYTES and b"\noid " in content


def refuse_lfs_pointer(path: str | Path, error: type[UserError] = UserError) -> None:
    """Raise `error` if the file is a Git LFS pointer.

    A missing or unreadable file passes; the code that opens it next reports the cause.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(POINTER_BYTES)
    except OSError:
        return
    if is_lfs_pointer(head):
        raise error(f"{path}: {LFS_REMEDY}")
