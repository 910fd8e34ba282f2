"""The starting point of a run: initial weights, its own newest checkpoint, an earlier one of its own, or another run's."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.arch.tensors import model_parameters
from megatron_hybrid.checkpoint.folders import (
    check_same_tensors,
    checkpoint_step,
    complete_checkpoints,
    find_checkpoint,
)
from megatron_hybrid.checkpoint.format import CheckpointError, state_name
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.config.checkpoint import Take
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.launch.variables import restart_count
from megatron_hybrid.train.changes import (
    config_changes,
    data_changes,
    model_changes,
    refuse_changes,
    stage_changes,
)
from megatron_hybrid.train.run_lock import RunFolderError


@dataclass(frozen=True)
class Start:
    """The starting point. `resume` and `rewind` continue the run itself; `checkpoint` begins a new run."""

    kind: Literal["initial", "resume", "rewind", "checkpoint"]
    folder: Path | None = None
    take: Take = "everything"
    notes: tuple[str, ...] = ()
    """Lines for the log: damaged checkpoints that were set aside, and what could not be verified."""
    fell_back: bool = False
    """True if a newer checkpoint of the run is damaged."""

    @property
    def continues(self) -> bool:
        """True if the run's earlier checkpoints and logs belong to it."""
        return self.kind in ("resume", "rewind")

    def __str__(self) -> str:
        match self.kind:
            case "initial":
                return "started from initial weights"
            case "resume":
                return f"resumed from {self.folder}"
            case "rewind":
                return f"rewound: resumed from {self.folder}"
            case "checkpoint":
                what = {"weights": "the weights of ", "moments": "weights and moments of ", "everything": ""}[self.take]
                return f"started from {what}{self.folder}"


def choose_start(config: RunConfig, env: Mapping[str, str] = os.environ) -> Start:
    """Choose the starting point. Call it on one rank and send the result to the others.

    A job that SLURM or a launcher restarted always resumes its newest checkpoint: its earlier attempt has carried out what the
    `checkpoint` section asks for.

    Raises:
        RunFolderError: `checkpoint.resume = none` in a folder with checkpoints.
        CheckpointError: the named folder holds no complete checkpoint, or one that the run has set aside.
        OSError: the folder of the run's checkpoints cannot be read.
    """
    resume, init_from, run_dir = config.checkpoint.resume, config.checkpoint.init_from, Path(config.run_dir)
    own = complete_checkpoints(run_dir / "checkpoints")
    restarted = restart_count(env) > 0
    if own and restarted:
        return Start("resume", own[-1])
    if own and _has_rewound(config, own):
        note = f"this command has rewound the run already; to rewind it again, remove the checkpoints after {resume}"
        return Start("resume", own[-1], notes=(note,))
    if own and resume == "none":
        raise RunFolderError(
            f"checkpoint.resume: none starts a new run, and {run_dir} holds {len(own)} checkpoints of an earlier one, the "
            f"newest of step {checkpoint_step(own[-1])}; give another run_dir, or set checkpoint.resume to auto to "
            "continue the earlier run"
        )
    field, folder = ("resume", resume) if init_from is None else ("init_from", init_from)
    if folder in ("auto", "none"):
        return Start("resume", own[-1]) if own else Start("initial")
    if own and not Path(folder).resolve().is_relative_to(run_dir.resolve()):
        return Start("resume", own[-1])  # the run began there, and has its own checkpoints since then
    named = find_checkpoint(folder, f"checkpoint.{field}")
    mine = next((folder for folder in own if folder.samefile(named)), None)
    if mine is None and own:
        raise CheckpointError(
            f"checkpoint.{field}: {folder} was set aside when the run was rewound; to continue from it, name it in a run with "
            "another run_dir"
        )
    if mine is None:
        return Start("checkpoint", named, "everything" if init_from is None else config.checkpoint.take)
    return Start("resume" if mine == own[-1] else "rewind", mine)


def _has_rewound(config: RunConfig, own: list[Path]) -> bool:
    """Return True if the newest checkpoint was saved by a run with this configuration, which rewound to the named checkpoint."""
    named = Path(config.checkpoint.resume)
    if named.parent.resolve() != own[-1].parent.resolve():
        return False
    for folder in reversed(own):
        with suppress(CheckpointError):  # it is damaged, and the run falls back to the one before it
            saved_by = read_index(folder).run
            return folder.name > named.name and not config_changes(saved_by, config.model_dump(mode="json"))
    return False


def check_start_point(config: RunConfig, start: Start, identity: dict[str, Any] | None) -> list[str]:
    """Compare the run with the one that saved the checkpoint. Call it before the model is built.

    Args:
        identity: identity of this run's data (data/fingerprint.py); None: do not compare the data.

    Returns:
        A line for every field that changed.

    Raises:
        CheckpointError: another model's tensors; changes that the start does not allow (train/changes.py) and that
            `checkpoint.allow_changes` does not name; moments that the checkpoint does not hold.
        RunFolderError: no steps are left to train.
    """
    if start.folder is None:
        return []
    with CheckpointReader(start.folder, verify="sizes") as reader:
        index, theirs = reader.index, reader.model
    if start.take != "everything":
        check_stage(start.folder, theirs, index.state.get("vocabulary"), config)
        if start.take == "moments":
            _check_moments(config, reader)
    else:
        check_same_tensors(start.folder, theirs, config.model)
        _check_states(config, reader)
        _check_work_left(config, start.folder, index.state.get("step", 0))
        changes = model_changes(theirs, config.model)
        if identity is not None:
            changes = data_changes(index.run, index.state, config, identity) | changes
        refuse_changes(start.folder, changes, config.checkpoint.allow_changes)
    now = config.model_dump(mode="json")
    before = index.run if "train" in index.run else {"model": theirs.model_dump(mode="json")}
    known = {name: now[name] for name in now if name in before}
    return [
        f"changed since {start.folder.name}: {field} {text}" for field, text in config_changes(before, known).items()
    ]


def check_stage(folder: Path, theirs: ModelConfig, vocabulary: object, config: RunConfig) -> None:
    """Check that a stage can start from weights of a model.

    Args:
        folder: where the weights come from, for errors.
        vocabulary: its identity (data/vocabulary.py); None: unknown.

    Raises:
        CheckpointError: names the fields that differ and may not.
    """
    check_same_tensors(folder, theirs, config.model)
    changes = stage_changes(vocabulary, config, model_changes(theirs, config.model))
    refuse_changes(folder, changes, config.checkpoint.allow_changes)


def _check_moments(config: RunConfig, reader: CheckpointReader) -> None:
    """Check that a checkpoint holds the moments of this run's optimizer, and their number of updates."""
    absent = _absent_states(config, reader)
    if absent or "updates" not in reader.index.state:
        raise CheckpointError(
            f"checkpoint.take: moments, and {reader.folder} does not hold {', '.join(absent or ['their number of updates'])} of "
            f"{config.train.optimizer.kind}; set it to weights, or name a checkpoint that a run saved"
        )


def _check_states(config: RunConfig, reader: CheckpointReader) -> None:
    """Check that a run resumes with the optimizer that it had. A checkpoint may have weights alone."""
    if reader.has_optimizer() and (absent := _absent_states(config, reader)):
        raise CheckpointError(
            f"train.optimizer.kind: {config.train.optimizer.kind}, and {reader.folder} does not hold {', '.join(absent)} of all "
            "its parameters; set it to the optimizer of that run, or take only its weights in a new run, by checkpoint.init_from and "
            "checkpoint.take: weights"
        )


def _absent_states(config: RunConfig, reader: CheckpointReader) -> list[str]:
    """Return the states of this run's optimizer that a checkpoint does not hold of every parameter."""
    spec = OPTIMIZERS[config.train.optimizer.kind]
    wanted = (
        (state, tensor.name)
        for packed in model_parameters(config.model)
        for tensor in packed.tensors
        for state in spec.of(packed).states
    )
    return list(dict.fromkeys(state for state, name in wanted if state_name(state, name) not in reader.index.tensors))


def _check_work_left(config: RunConfig, folder: Path, step: int) -> None:
    if step >= config.train.steps:
        raise RunFolderError(
            f"train.steps: {config.train.steps} leaves nothing to train: {folder} is of step {step}. Give more steps; or, to "
            "take only the weights of another run, name it in checkpoint.init_from"
        )


def set_later_aside(run_dir: Path, rewound_to: Path) -> Path | None:
    """Move the checkpoints after the one that a run is rewound to into a separate folder, with a copy of the metrics.

    Returns:
        The folder, `checkpoints/set-aside-N`; None if there are no later checkpoints.
    """
    root = run_dir / "checkpoints"
    later = [folder for folder in complete_checkpoints(root) if folder.name > rewound_to.name]
    if not later:
        return None
    number = 1
    while (aside := root / f"set-aside-{number}").exists():
        number += 1
    aside.mkdir()
    if (metrics := run_dir / "metrics.jsonl").is_file():
        shutil.copyfile(metrics, aside / metrics.name)
    for folder in reversed(later):  # newest first: if killed in between, the run resumes from the oldest of those left
        os.replace(folder, aside / folder.name)
    return aside
