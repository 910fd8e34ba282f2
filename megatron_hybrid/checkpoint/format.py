"""The checkpoint format: safetensors files and one JSON index. There is no pickle in it.

    step-00001000/
        index.json                  the tensors, the file of each slice, the run's state and configuration, and checksums
        rank-00000.safetensors      the slices that rank 0 wrote; at most about 4 GiB per file
        rank-00000-001.safetensors  the rest of them
        original/                   files of the model that was converted, if it was (checkpoint/origin.py)

The index describes true tensors (arch/tensors.py): no padding, no packing, no layout. Weights are stored in rectangular
slices. Optimizer state may be stored in flattened ranges of slices, because the distributed optimizer splits it that way.

The index holds the SHA-256 of every other file, and ends with its own: that of its text without this last member.

megatron-core's own `torch_dist` format keeps metadata and common state in pickles, and gathers the distributed optimizer's
state on one rank to reshard it. This format does neither.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.checkpoint.coverage import coverage_problem
from megatron_hybrid.config.translate import translate

FORMAT = "megatron_hybrid/2"
INDEX = "index.json"
_STEP = re.compile(r"step-(\d{8})")


class CheckpointError(UserError):
    """A checkpoint is incomplete, damaged or does not fit. The message names the file or tensor and the remedy."""


def state_name(state: str, tensor: str) -> str:
    """Return the name of an optimizer state of a tensor in the index."""
    return f"optimizer.{state}/{tensor}"


def slices_of_range(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[TensorSlice]:
    """Split elements [start, stop) of a flattened tensor with one or two dimensions into at most three slices, in order."""
    width = prod(shape[1:])
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width:
            rows, columns = 1, min(width - column, stop - start)
        else:
            rows, columns = (stop - start) // width, width
        yield TensorSlice((row, column)[: len(shape)], (rows, columns)[: len(shape)])
        start += rows * columns


@dataclass(frozen=True)
class StoredSlice:
    """One entry of one file: a slice of a tensor, or elements [start, stop) of the flattened slice."""

    file: str
    entry: str
    slice: TensorSlice
    range: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Number of elements in the entry."""
        return self.slice.numel if self.range is None else self.range[1] - self.range[0]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the entry in the file."""
        return self.slice.shape if self.range is None else (self.numel,)

    def parts(self) -> Iterator[tuple[TensorSlice, int]]:
        """Yield the slices of the tensor that the entry holds, each with the position of its first element in the entry."""
        if self.range is None:
            yield self.slice, 0
            return
        first = 0
        for part in slices_of_range(*self.range, self.slice.shape):
            offset = tuple(at + inner for at, inner in zip(self.slice.offset, part.offset, strict=True))
            yield TensorSlice(offset, part.shape), first
            first += part.numel

    def as_json(self) -> dict[str, Any]:
        """Return the slice as the index holds it."""
        return {
            "file": self.file,
            "entry": self.entry,
            "offset": self.slice.offset,
            "shape": self.slice.shape,
            "range": self.range,
        }


@dataclass
class TensorEntry:
    """A true tensor, or one of its optimizer states. `dtype` is the name in safetensors: F32, BF16, ..."""

    dtype: str
    shape: tuple[int, ...]
    slices: list[StoredSlice] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the entry as the index holds it."""
        return {"dtype": self.dtype, "shape": self.shape, "shards": [stored.as_json() for stored in self.slices]}


@dataclass
class Index:
    """Contents of the index."""

    model: dict[str, Any]
    """Configuration of the model."""
    run: dict[str, Any]
    """Configuration of the run, for the record, and the origin of its weights (checkpoint/origin.py)."""
    state: dict[str, Any]
    """State that the trainer resumes from: step, samples consumed, window of the skip-step, ..."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Safetensors files: {name: {"bytes": int, "sha256": str}}"""
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    other_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """All other files in the same form, by their path in the folder."""
    checksum: str | None = None
    """SHA-256 of the index as it was read. None: an earlier version wrote the checkpoint."""

    def dump(self) -> str:
        """Return the index as JSON, with its checksum."""
        content = {
            "format": FORMAT,
            "model": self.model,
            "run": self.run,
            "state": self.state,
            "files": self.files,
            "other_files": self.other_files,
            "tensors": {name: entry.as_json() for name, entry in self.tensors.items()},
        }
        return add_checksum(json.dumps(content, separators=(",", ":")))

    def all_files(self) -> dict[str, dict[str, Any]]:
        """Return size and SHA-256 of every file but the index, by its path in the folder."""
        return {**self.files, **self.other_files}

    def unchecked(self) -> str | None:
        """Return what no checksum protects; None: everything is protected."""
        if self.checksum is None:
            return f"an earlier version wrote it: its {INDEX} has no checksum, so that changes to it go unnoticed"
        without = [name for name, facts in self.all_files().items() if not facts.get("sha256")]
        return f"there is no checksum of {', '.join(without[:4])}, so that changes go unnoticed" if without else None

    def merge(self, tensors: dict[str, TensorEntry]) -> None:
        """Add the slices that another rank wrote.

        Raises:
            CheckpointError: ranks disagree about a tensor's dtype or shape.
        """
        for name, entry in tensors.items():
            mine = self.tensors.setdefault(name, TensorEntry(entry.dtype, entry.shape))
            if (mine.dtype, mine.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"{name}: ranks disagree, {mine.dtype} {mine.shape} and {entry.dtype} {entry.shape}"
                )
            mine.slices += entry.slices

    def model_config(self, folder: Path) -> ModelConfig:
        """Return the configuration of the model.

        Args:
            folder: the checkpoint's folder, for errors.

        Raises:
            CheckpointError: it is not valid.
        """
        where = f"{folder}: the model in its {INDEX} is not valid"
        try:
            return ModelConfig.model_validate(self.model)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {str(translate(error, ModelConfig))[:2000]}") from None
        except (ConfigError, ValueError) as error:
            raise CheckpointError(f"{where}: {error!s:.500}") from None

    def check_state(self, folder: Path) -> None:
        """Check the part of the state that a run resumes from. A converted checkpoint has no state.

        Raises:
            CheckpointError: a count is missing or is not a number.
        """
        for name in ("step", "samples", "updates") if self.state else ():
            value = self.state.get(name)
            if value is not None and (type(value) is not int or not 0 <= value < 1 << 62):
                raise CheckpointError(
                    f"{folder}: damaged: {name} in its state is {value!r:.50}; use an earlier checkpoint"
                )
        expected = _STEP.fullmatch(folder.name)
        if expected and self.state.get("step", int(expected[1])) != int(expected[1]):
            raise CheckpointError(
                f"{folder}: its content is of step {self.state['step']}: folders were exchanged or renamed; give it the name of "
                "its step"
            )

    def coverage_problems(self) -> Iterator[str]:
        """Yield a line for each tensor whose slices overlap or do not cover it."""
        for name, entry in self.tensors.items():
            parts = (part for stored in entry.slices for part, _ in stored.parts())
            if problem := coverage_problem(entry.shape, parts):
                yield f"{name} {problem}"


def add_checksum(text: str) -> str:
    """Return the text of a JSON object with its SHA-256 as the last member."""
    return f'{text[:-1]},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}'
