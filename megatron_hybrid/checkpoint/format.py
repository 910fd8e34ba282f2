"""The checkpoint format: safetensors files and one JSON index. There is no pickle in it.

    step-00001000/
        index.json                  the tensors, the file of each slice, the run's state and configuration
        rank-00000.safetensors      the slices that rank 0 wrote; at most about 4 GiB per file
        rank-00000-001.safetensors  the rest of them

The index describes true tensors (arch/tensors.py): no padding, no packing, no layout. Weights are stored in rectangular
slices. Optimizer state may be stored in flattened ranges of slices, because the distributed optimizer splits it that way.

megatron-core's own `torch_dist` format keeps metadata and common state in pickles, and gathers the distributed optimizer's
state on one rank to reshard it. This format does neither.
"""

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
from megatron_hybrid.base.lfs import refuse_lfs_pointer
from megatron_hybrid.config.renames import rename_saved
from megatron_hybrid.config.translate import translate

FORMAT = "megatron_hybrid/1"
INDEX = "index.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


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
    """{file: {"bytes": int, "sha256": str}}"""
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    def dump(self) -> str:
        """Return the index as JSON."""
        tensors = {name: entry.as_json() for name, entry in self.tensors.items()}
        content = {"model": self.model, "run": self.run, "state": self.state, "files": self.files, "tensors": tensors}
        return json.dumps({"format": FORMAT, **content}, separators=(",", ":"))

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

    def incomplete(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, number of stored values, number of values) of each tensor whose slices do not add up."""
        for name, entry in self.tensors.items():
            held, total = sum(stored.numel for stored in entry.slices), prod(entry.shape)
            if held != total:
                yield name, held, total


def _whole_numbers(values: list[int]) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise TypeError(f"{values!r:.100} are not whole numbers")
    return tuple(values)


def _slice_from_json(data: dict[str, Any]) -> StoredSlice:
    part = TensorSlice(_whole_numbers(data["offset"]), _whole_numbers(data["shape"]))
    if not data["range"]:
        return StoredSlice(data["file"], data["entry"], part)
    start, stop = _whole_numbers(data["range"])
    return StoredSlice(data["file"], data["entry"], part, (start, stop))


def _check_slice(name: str, shape: tuple[int, ...], stored: StoredSlice) -> None:
    if not _FILE_NAME.fullmatch(stored.file):
        raise CheckpointError(
            f"{name}: {stored.file!r} is not the name of a safetensors file in the checkpoint's folder"
        )
    part = stored.slice
    inside = len(part.offset) == len(part.shape) == len(shape) and all(
        at >= 0 and length > 0 and at + length <= total
        for at, length, total in zip(part.offset, part.shape, shape, strict=True)
    )
    if inside and stored.range is not None:
        inside = len(shape) in (1, 2) and 0 <= stored.range[0] < stored.range[1] <= part.numel
    if not inside:
        raise CheckpointError(f"{name}: a shard at {part.offset} of shape {part.shape} is outside the tensor's {shape}")


def tensors_from_json(data: dict[str, Any]) -> dict[str, TensorEntry]:
    """Parse and check the `tensors` of an index, or of one rank's part of it.

    Raises:
        CheckpointError: a file outside the folder, a slice outside its tensor, a range outside its slice.
        TypeError, KeyError, ValueError: values of another type or form.
    """
    tensors = {}
    for name, entry in data.items():
        shape = _whole_numbers(entry["shape"])
        slices = [_slice_from_json(stored) for stored in entry["shards"]]
        if not all(isinstance(text, str) for text in (entry["dtype"], *(stored.entry for stored in slices))):
            raise TypeError(f"{name}: dtype and entry must be text")
        for stored in slices:
            _check_slice(name, shape, stored)
        tensors[name] = TensorEntry(entry["dtype"], shape, slices)
    return tensors


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def read_index(folder: Path) -> Index:
    """Read the index of a complete checkpoint, and check that its files have the sizes that the index states.

    Raises:
        CheckpointError: no index, not JSON, another format, or a file that is missing or has another size.
    """
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {INDEX}; name a folder such as RUN/checkpoints/step-00001000"
        )
    refuse_lfs_pointer(path)
    try:
        index = _parse_index(path)
        sizes = {name: (facts["bytes"], facts["sha256"])[0] for name, facts in index.files.items()}
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error!s:.200}); use an earlier checkpoint"
        ) from error
    for name, size in sizes.items():
        _check_file(path, name, size)
    return index


def _parse_index(path: Path) -> Index:
    data = json.loads(path.read_text(), object_pairs_hook=_refuse_duplicates)
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {data.get('format')!r}; this version reads {FORMAT!r}")
    index = Index(data["model"], data["run"], data["state"], data["files"], tensors_from_json(data["tensors"]))
    if not all(isinstance(part, dict) for part in (index.model, index.run, index.state)):
        raise TypeError("model, run and state must be objects")
    index.run = rename_saved(index.run)
    return index


def _check_file(index: Path, name: str, size: int) -> None:
    if not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{index}: {name!r} is not the name of a safetensors file in the checkpoint's folder")
    file = index.parent / name
    if file.is_file() and file.stat().st_size == size:
        return
    if file.is_file():
        refuse_lfs_pointer(file)
    found = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
    raise CheckpointError(f"{file}: {found}, {size!r:.50} bytes were written; use an earlier checkpoint")
