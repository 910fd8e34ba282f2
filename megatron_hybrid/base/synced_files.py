"""Files that survive a power failure: synced to disk before they are used."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Sync a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and sync it to disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it to disk, and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    write_synced(temporary, content)
    os.replace(temporary, path)
