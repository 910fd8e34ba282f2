"""Git LFS pointers: small text files that a clone without git-lfs leaves in place of large files."""

from pathlib import Path

from megatron_hybrid.config.errors import UserError

_STARTS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
LONGEST_START = max(map(len, _STARTS))
"""Bytes of a file that `is_lfs_pointer` needs."""


class LfsPointerError(UserError):
    """A Git LFS pointer where a file's content was expected; names the file and the remedy."""


def is_lfs_pointer(first_bytes: bytes) -> bool:
    """Return whether a file that begins with these bytes is a Git LFS pointer."""
    return first_bytes.startswith(_STARTS)


def refuse_lfs_pointer(path: str | Path) -> None:
    """Check that a file is not a Git LFS pointer.

    Raises:
        LfsPointerError: it is one.
    """
    with open(path, "rb") as file:
        first = file.read(LONGEST_START)
    if is_lfs_pointer(first):
        raise LfsPointerError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs install && git lfs pull` in its repository"
        )
