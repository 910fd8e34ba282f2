"""Checks the files of a run before it is queued: `megatron-hybrid pretrain CONFIG --dry-run`. Uses no torch and reads no tokens."""

import os
import re
from collections.abc import Callable
from glob import glob, has_magic
from pathlib import Path

from megatron_hybrid.base.errors import Problems, UserError, join
from megatron_hybrid.checkpoint.folders import complete_checkpoints
from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.run_dir import RunDirError, check_run_dir
from megatron_hybrid.config.tasks import generation_problems
from megatron_hybrid.data.boundaries import boundary_origin
from megatron_hybrid.data.dataset import count_stream_samples
from megatron_hybrid.data.sources import open_source
from megatron_hybrid.evaluation.task_files import TaskFile, generate_text, read_tasks
from megatron_hybrid.train.start import check_start_point, choose_start


class FileProblems:
    """Finds problems with the files of a run.

    Attributes:
        wrong: files with which no machine can train.
        absent: files and folders that are not on this machine. They may be on others, or may not exist yet.
        unused: missing files that training does not need.
    """

    def __init__(self, config: RunConfig, world_size: int) -> None:
        self.config = config
        self.wrong, self.absent, self.unused = Problems(), Problems(), Problems()
        for field, source in config.data.sources().items():
            self._look_at_source(join(field, "path"), source)
        self._look_at_tokenizer()
        self._look_at_tasks()
        self._look_at_checkpoints()
        try:
            check_run_dir(config, world_size)
        except RunDirError as error:
            self.wrong += error.problems

    def _look_at_source(self, field: str, source: SourceConfig) -> None:
        """Open a source and cut it into samples, as training does."""
        absent = _absent_source(source)
        if absent:
            self.absent.add(field, absent)
            return

        def look() -> None:
            tokens, data = open_source(source, self.config.model.vocab_size), self.config.data
            if data.documents != "pack":
                count_stream_samples(tokens, data.sequence_length)
            if data.documents != "keep":
                for shard in tokens.shards:
                    boundary_origin(shard, self.config.model.eos_token_id)

        self._try(field, look)

    def _look_at_tokenizer(self) -> None:
        name = self.config.data.tokenizer
        if name != "byte" and not os.path.isfile(os.path.join(name, "tokenizer.json")):
            self.unused.add(
                "data.tokenizer",
                f"{name}: there is no such folder with a tokenizer.json; training does without it, megatron-hybrid generate does not",
            )

    def _look_at_tasks(self) -> None:
        """Read the task files, and check that the layout can evaluate them."""
        config, tasks = self.config, list[TaskFile]()
        for number, name in enumerate(config.tasks.paths):
            field = join("tasks.paths", number)
            if os.path.lexists(name):
                self._try(field, lambda name=name: tasks.extend(read_tasks([name])))  # type: ignore[misc]
            else:
                self.absent.add(field, f"{name}: no such file or folder; make it, or correct the path")
        if generate_text(tasks):
            self.wrong += generation_problems(config.model, config.train, config.parallel, config.precision)

    def _look_at_checkpoints(self) -> None:
        """Check what the run would start from, as the run itself does, but for its data."""
        resume, init_from = self.config.checkpoint.resume, self.config.checkpoint.init_from
        field, folder = ("checkpoint.resume", resume) if init_from is None else ("checkpoint.init_from", init_from)
        own = complete_checkpoints(Path(self.config.run_dir, "checkpoints"))
        if not own and folder not in ("auto", "none") and not os.path.exists(folder):
            remedy = "give a checkpoint's, auto, or none" if init_from is None else "give a checkpoint's, or null"
            self.absent.add(field, f"{folder}: there is no such folder; {remedy}")
        else:
            self._try(field, lambda: check_start_point(self.config, choose_start(self.config), None))

    def _try(self, field: str, look: Callable[[], object]) -> None:
        try:
            look()
        except UserError as error:
            self.wrong.add(field, re.sub(rf"^{re.escape(field)}( =|:) ", "", str(error)))
        except OSError as error:
            self.wrong.add(field, f"{error.filename}: cannot be read: {error.strerror}; check its permissions")


def _absent_source(source: SourceConfig) -> str:
    """Return the message for a source without any file; empty if there is a file."""
    path = source.path
    if os.path.lexists(path):
        return ""
    if has_magic(path):
        return "" if glob(path, recursive=True) else f"{path}: no such file: nothing matches the pattern"
    names = [path] if path.endswith(".npy") else [f"{path}.idx", f"{path}.bin"]
    if any(os.path.lexists(name) for name in names):
        return ""
    return f"{' and '.join(names)}: no such file; make it with megatron-hybrid preprocess, or correct the path"


def check_files(config: RunConfig, world_size: int, required: bool) -> list[str]:
    """Check the files of a run. Return a line for each file that training does not need or that is not on this machine.

    Args:
        required: treat files that are not on this machine as errors.

    Raises:
        ConfigError: one line for each wrong file.
    """
    found = FileProblems(config, world_size)
    errors = Problems([*found.wrong, *(found.absent if required else ())])
    errors.raise_if_any()
    return [f"{field}: {message}" for field, message in (*(() if required else found.absent), *found.unused)]
