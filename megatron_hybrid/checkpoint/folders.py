"""Checkpoint folders: their names, which of them are complete, and which one a run starts from. Imports no torch."""

import re
from pathlib import Path

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError

_NAME = re.compile(r"step-(\d{8})")


def checkpoint_step(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name, or None if the folder has another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_folder(root: Path) -> list[Path]:
    """Return the content of a folder in the order of names, or an empty list if there is no such folder.

    `Path.glob` finds nothing in a folder that cannot be read. A run would take that for a folder without checkpoints.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        return sorted(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def complete_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first. Temporary folders have other names.

    Raises:
        OSError: the folder cannot be read.
    """
    return [path for path in list_folder(root) if checkpoint_step(path) is not None and (path / INDEX).is_file()]


def find_checkpoint(name: str, field: str) -> Path:
    """Return a checkpoint's folder, or the newest checkpoint if the folder is a run or its checkpoints.

    Args:
        field: configuration field that names the folder.

    Raises:
        CheckpointError: the folder holds no complete checkpoint.
    """
    folder = Path(name)
    if (folder / INDEX).is_file():
        return folder
    for place in (folder, folder / "checkpoints"):
        if found := complete_checkpoints(place):
            return found[-1]
    raise CheckpointError(f"{field}: {name}: no complete checkpoint there; give a folder with an {INDEX}")


def check_same_tensors(folder: Path, theirs: ModelConfig, mine: ModelConfig) -> None:
    """Check that a checkpoint's model has the same tensors as this run's. Fields that do not affect shapes may differ.

    Raises:
        CheckpointError: names the first field that differs.
    """
    if model_tensors(mine) == model_tensors(theirs):
        return
    ours, other = (
        m.architecture() | {"layer_pattern": "".join(m.layers), "head_dim": m.attention_head_dim}
        for m in (mine, theirs)
    )
    field = next(name for name, value in ours.items() if other[name] != value)
    raise CheckpointError(f"{folder}: model.{field} is {other[field]!r} there and {ours[field]!r} in this run")
