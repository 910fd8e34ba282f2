"""What a checkpoint is on disk: safetensors files and one JSON index. No pickle anywhere.

    step-00001000/
        index.json                  what the tensors are, which file holds which part, the run's state and configuration
        rank-00000.safetensors      what each rank wrote, of a large part the first 4 GiB
        rank-00000-001.safetensors  the next

The index speaks of true tensors (arch/tensors.py): no padding, no packing, no layout. A tensor's shards are boxes of it;
a shard of optimizer state may be a range of its box, flattened, because the distributed optimizer splits that way.

megatron-core's own `torch_dist` format keeps its metadata and its common state in pickles and gathers the distributed
optimizer's state on one rank to reshard it; this one does neither.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.base.lfs import refuse_lfs_pointer
from megatron_hybrid.config.renames import rename_saved

FORMAT = "megatron_hybrid/1"
INDEX = "index.json"
STATES = ("master", "exp_avg", "exp_avg_sq")
"""Optimizer state of a tensor: fp32 master weight (where the model's is not fp32 itself) and Adam's two moments."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged or does not fit; names the file or tensor and what to do."""


def state_name(state: str, tensor: str) -> str:
    """The name an optimizer state of a tensor has in the index."""
    return f"optimizer.{state}/{tensor}"


def boxes_of_range(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Elements [start, stop) of a flattened matrix of this width as boxes, in their order: (row, column, rows, columns) of the rest
    of a row, of whole rows, of the beginning of a row."""
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width:
            rows, columns = 1, min(width - column, stop - start)
        else:
            rows, columns = (stop - start) // width, width
        yield row, column, rows, columns
        start += rows * columns


@dataclass(frozen=True)
class Shard:
    """A box of a tensor, or a flattened range [start, stop) of that box, in one entry of one file."""

    file: str
    entry: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    range: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape) if self.range is None else self.range[1] - self.range[0]


@dataclass
class TensorEntry:
    """One true tensor, or one optimizer state of it. `dtype` is safetensors' name: F32, BF16, ..."""

    dtype: str
    shape: tuple[int, ...]
    shards: list[Shard] = field(default_factory=list)


@dataclass
class Index:
    """Everything a checkpoint says about itself."""

    model: dict[str, Any]
    """The model's configuration."""
    run: dict[str, Any]
    """The whole run's configuration, for the record, and where its weights came from (checkpoint/origin.py)."""
    state: dict[str, Any]
    """Step, samples consumed, skip window, ...: what the trainer resumes from."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{file: {"bytes": int, "sha256": str}}"""
    tensors: dict[str, TensorEntry] = field(default_factory=dict)

    def dump(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":"))

    def merge(self, tensors: dict[str, TensorEntry]) -> None:
        """Add another rank's shards."""
        for name, entry in tensors.items():
            mine = self.tensors.setdefault(name, TensorEntry(entry.dtype, entry.shape))
            if (mine.dtype, mine.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"{name}: ranks disagree, {mine.dtype} {mine.shape} and {entry.dtype} {entry.shape}"
                )
            mine.shards += entry.shards


def _whole_numbers(values: list[int]) -> tuple[int, ...]:
    if not all(type(value) is int for value in values):
        raise TypeError(f"{values!r:.100} are not whole numbers")
    return tuple(values)


def tensors_from_json(data: dict[str, Any]) -> dict[str, TensorEntry]:
    """Parse and check the `tensors` of an index or of a rank's part of it.

    Raises:
        CheckpointError: a file outside the folder, a shard outside its tensor, a range outside its box.
    """
    tensors = {}
    for name, entry in data.items():
        shape = _whole_numbers(entry["shape"])
        shards = [
            Shard(
                s["file"],
                s["entry"],
                _whole_numbers(s["offset"]),
                _whole_numbers(s["shape"]),
                _whole_numbers(s["range"]) if s["range"] else None,
            )
            for s in entry["shards"]
        ]
        if not all(isinstance(text, str) for text in (entry["dtype"], *(shard.entry for shard in shards))):
            raise TypeError(f"{name}: dtype and entry are text")
        for shard in shards:
            if not _FILE_NAME.fullmatch(shard.file):
                raise CheckpointError(
                    f"{name}: {shard.file!r} is not the name of a safetensors file in the checkpoint's folder"
                )
            inside = len(shard.offset) == len(shard.shape) == len(shape) and all(
                o >= 0 and n > 0 and o + n <= total
                for o, n, total in zip(shard.offset, shard.shape, shape, strict=True)
            )
            if not inside or (
                shard.range and (len(shard.range) != 2 or not 0 <= shard.range[0] < shard.range[1] <= prod(shard.shape))
            ):
                raise CheckpointError(
                    f"{name}: a shard at {shard.offset} of shape {shard.shape} lies outside the tensor's {shape}"
                )
        tensors[name] = TensorEntry(entry["dtype"], shape, shards)
    return tensors


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return result


def read_index(folder: Path) -> Index:
    """Read a complete checkpoint's index.

    Raises:
        CheckpointError: no index, not JSON, another format, a file missing or of another size.
    """
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {INDEX}; name a folder such as RUN/checkpoints/step-00001000"
        )
    refuse_lfs_pointer(path)
    try:
        data = json.loads(path.read_text(), object_pairs_hook=_no_key_twice)
        if data.get("format") != FORMAT:
            raise CheckpointError(f"{path}: format {data.get('format')!r}; this version reads {FORMAT!r}")
        tensors = tensors_from_json(data["tensors"])
        index = Index(data["model"], data["run"], data["state"], data["files"], tensors)
        sizes = {name: (facts["bytes"], facts["sha256"]) for name, facts in index.files.items()}
        if not all(isinstance(part, dict) for part in (index.model, index.run, index.state)):
            raise TypeError("model, run and state are objects")
        index.run = rename_saved(index.run)
    except CheckpointError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error!s:.200}); use an earlier checkpoint"
        ) from error
    for name, (size, _) in sizes.items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {name!r} is not the name of a safetensors file in the checkpoint's folder")
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            if file.is_file():
                refuse_lfs_pointer(file)
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
            raise CheckpointError(f"{file}: {found}, {size!r:.50} bytes were written; use an earlier checkpoint")
    return index
