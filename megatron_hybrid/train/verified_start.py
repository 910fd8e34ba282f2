"""The starting point of a run, verified by all ranks: a damaged newest checkpoint is set aside, and the run falls back."""

from dataclasses import replace
from pathlib import Path

from megatron_hybrid.base.errors import storage_errors
from megatron_hybrid.checkpoint.folders import checkpoint_step, complete_checkpoints, list_folder
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.checkpoint.removal import DAMAGED, set_damaged_aside
from megatron_hybrid.checkpoint.shared_verification import find_damage_together
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.distributed.first_rank import on_first_rank
from megatron_hybrid.train.start import Start, choose_start


def choose_verified_start(config: RunConfig) -> Start:
    """Choose the starting point on rank 0 and verify its files on all ranks. Every rank calls it.

    A run that resumes its newest checkpoint falls back to the newest one that is not damaged. Damaged ones are renamed. A checkpoint
    that the configuration names is never replaced by another one.

    Raises:
        RunFolderError, CheckpointError: on every rank alike. As `choose_start`; or no checkpoint is left that is not damaged.
        StorageError: on every rank alike, if a folder or file cannot be read. Nothing is renamed then.
    """
    start, older, damage = on_first_rank(lambda: _candidates(config))
    if start.folder is None:
        return start
    for folder in (start.folder, *older):
        problem = find_damage_together(folder, config.checkpoint.verify)
        if problem is None:
            break
        damage[folder] = problem
    else:
        raise CheckpointError(_nothing_left(start, damage))
    chosen = replace(start, folder=folder)
    return on_first_rank(lambda: _settle(chosen, damage))


def _candidates(config: RunConfig) -> tuple[Start, list[Path], dict[Path, str]]:
    """Return the starting point, the checkpoints to fall back to, newest first, and the damage of newer ones without an index."""
    start, root = choose_start(config), Path(config.run_dir) / "checkpoints"
    own = complete_checkpoints(root)
    there = list_folder(root)
    lost = [path for path in reversed(there) if checkpoint_step(path) and path.is_dir() and path not in own]
    aside = [path for path in there if path.name.startswith("step-") and DAMAGED in path.name]
    if start.kind == "initial" and (damaged := [*lost, *aside]):
        raise CheckpointError(
            f"{root} holds only damaged checkpoints, such as {damaged[0].name}; give a new run another run_dir, or remove them"
        )
    if start.folder is None or start.kind != "resume":
        return start, [], {}
    if Path(config.checkpoint.resume).resolve() == start.folder.resolve():
        return start, [], {}
    newer = {path: f"it has no {INDEX}" for path in lost if path.name > start.folder.name}
    return start, own[-2::-1], newer


def _settle(start: Start, damage: dict[Path, str]) -> Start:
    """Set the damaged checkpoints aside and return the start with a note for each, and for what could not be checked."""
    notes = []
    for folder, problem in damage.items():
        with storage_errors(folder):
            suffix = set_damaged_aside(folder).name.removeprefix(folder.name)
        notes.append(
            f"warning: the checkpoint of step {checkpoint_step(folder)} is damaged: {_inside(folder, problem)}. Its folder has "
            f"been renamed with the suffix {suffix}; remove it to free the space"
        )
    assert start.folder is not None
    if unchecked := read_index(start.folder).unchecked():
        notes.append(f"warning: {start.folder}: {unchecked}")
    return replace(start, notes=(*start.notes, *notes), fell_back=bool(damage))


def _inside(folder: Path, problem: str) -> str:
    """Return a problem with paths relative to the checkpoint's folder, which is renamed."""
    return problem.replace(f"{folder}/", "").removeprefix(f"{folder}: ")


def _nothing_left(start: Start, damage: dict[Path, str]) -> str:
    if start.kind != "resume":
        return f"{start.folder} is damaged: {damage[start.folder] if start.folder else ''}"
    lines = "\n".join(f"  step {checkpoint_step(folder)}: {problem}" for folder, problem in damage.items())
    return f"no undamaged checkpoint is left; restore one from a copy, or start a new run in another run_dir:\n{lines}"
