"""Removal of checkpoints, of the remains of killed saves and removals, and of damaged checkpoints from a run's list.

Only folders with the names that this package gives are touched. Links are removed or renamed, never followed.

    .saving-step-N      a checkpoint while it is written
    .replaced-step-N    an earlier checkpoint of the same step, until the new one has its name
    .deleting-step-N    a checkpoint while it is removed
    step-N.damaged      a damaged checkpoint, set aside for inspection
"""

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from megatron_hybrid.checkpoint.folders import list_folder

SAVING, REPLACED, DELETING = ".saving-", ".replaced-", ".deleting-"
"""Prefixes of a checkpoint's folder while it is written, replaced and removed."""
DAMAGED = ".damaged"
_REMAINS = re.compile(r"\.(?:saving|replaced|deleting)-(step-\d{8})")


class Remains(NamedTuple):
    """Names of temporary folders, and for those that could not be removed the reasons."""

    removed: list[str]
    kept: dict[str, str]


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it, or only the link if it is a link.

    Raises:
        OSError: of the first file that cannot be removed. The others are removed.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        errors: list[BaseException] = []
        shutil.rmtree(path, onexc=lambda function, name, error: errors.append(error))
        if left := [error for error in errors if not isinstance(error, FileNotFoundError)]:
            raise left[0]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, or what an earlier call could not remove of it.

    It is renamed first, because one that is half removed must not look complete.

    Raises:
        OSError: something in it cannot be removed, such as a file that another process has open on NFS.
    """
    doomed = folder.with_name(DELETING + folder.name)
    if os.path.lexists(folder):
        remove_folder(doomed)
        os.replace(folder, doomed)
    remove_folder(doomed)


def remove_remains(root: Path) -> Remains:
    """Remove what interrupted saves and removals left behind. The run's lock must be held.

    A checkpoint that was about to be replaced gets its name back, if the new one did not take it.

    Raises:
        OSError: the folder cannot be read, or a checkpoint does not get its name back.
    """
    found = Remains([], {})
    for path in list_folder(root):
        if not (match := _REMAINS.fullmatch(path.name)):
            continue
        target = root / match[1]
        if path.name.startswith(REPLACED) and not os.path.lexists(target):
            os.replace(path, target)
        else:
            try:
                remove_folder(path)
                found.removed.append(path.name)
            except OSError as error:
                found.kept[path.name] = error.strerror or str(error)
    return found


def set_damaged_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that no run starts from it, and return its new path."""
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}{DAMAGED}{f'-{number}' if number > 1 else ''}")):
        number += 1
    os.replace(folder, aside)
    return aside
