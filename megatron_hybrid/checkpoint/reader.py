"""The reader of checkpoints. Training, conversion, verification and evaluation use it, and nothing else reads the format.

- `CheckpointReader.read`: one slice of one tensor, whatever layout wrote it.
- `CheckpointReader.stored`: where a tensor's values lie, for code that copies bytes instead of loading tensors.

torch is imported when the first tensor is read, not before.
"""

from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.optimizers.spec import MASTER
from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.format import CheckpointError, StoredSlice, TensorEntry, read_index, state_name

if TYPE_CHECKING:
    import torch

FP8_PREFIX = "fp8/"
"""Prefix of the scales that a run in FP8 saves. They belong to layers, not to tensors of the model."""


class CheckpointReader:
    """An open checkpoint. It reads only the bytes that are asked for. Use it in a `with`, or close it."""

    def __init__(self, folder: str | Path) -> None:
        """
        Raises:
            CheckpointError: not a checkpoint, or a damaged one.
        """
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.clear()

    @cached_property
    def model(self) -> ModelConfig:
        """Configuration of the model.

        Raises:
            CheckpointError: it is not valid.
        """
        return self.index.model_config(self.folder)

    def has_optimizer(self) -> bool:
        """Return whether the checkpoint holds states of an optimizer besides the master weights."""
        master = state_name(MASTER, "")
        return any(name.startswith("optimizer.") and not name.startswith(master) for name in self.index.tensors)

    def check_tensors(self) -> None:
        """Check that the checkpoint holds the tensors of its model, in their shapes, and no others.

        Raises:
            CheckpointError: names the first tensor that is missing, unknown or of another shape.
        """
        specs = model_tensors(self.model)
        for name, spec in specs.items():
            if (entry := self.index.tensors.get(name)) is None:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing")
            if entry.shape != spec.shape:
                raise CheckpointError(
                    f"{self.folder}: {name} is {entry.dtype} {list(entry.shape)}, and {list(spec.shape)} by its model"
                )
        for name in self.index.tensors:
            if not name.startswith(FP8_PREFIX) and _tensor_of(name) not in specs:
                raise CheckpointError(f"{self.folder}: {name!r:.200} is not a tensor of its model")

    def stored(self, name: str, state: str | None = None) -> TensorEntry:
        """Return dtype, shape and stored slices of a tensor, or of an optimizer state of it.

        Raises:
            CheckpointError: there is no such tensor.
        """
        name = state_name(state, name) if state else name
        if (entry := self.index.tensors.get(name)) is None:
            raise CheckpointError(f"{self.folder}: it has no tensor {name}")
        return entry

    def most_precise(self, name: str) -> str:
        """Return the name of a weight's fp32 master if there is one, else the weight's. The weight is a rounded copy of it."""
        master = state_name(MASTER, name)
        return master if master in self.index.tensors else name

    def local_tensors(self, rank: int) -> "dict[str, torch.Tensor]":
        """Return the tensors that rank `rank` saved for itself: its random state."""
        with safe_open(self.folder / f"rank-{rank:05d}.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("local.")]  # noqa: SIM118 - it is no dict
            return {name.removeprefix("local."): file.get_tensor(name) for name in names}

    def read(self, name: str, wanted: TensorSlice | None = None, state: str | None = None) -> "torch.Tensor":
        """Read a slice of a tensor, or of an optimizer state of it, to the CPU, in the dtype in which it was saved.

        Args:
            wanted: the slice; None: the whole tensor.

        Raises:
            CheckpointError: there is no such tensor, or its stored slices do not cover the wanted one.
        """
        entry = self.stored(name, state)
        whole = TensorSlice.whole(entry.shape)
        wanted = whole if wanted is None else wanted
        where = f"{self.folder}: {state_name(state, name) if state else name}"
        if whole.intersection(wanted) != wanted:
            raise CheckpointError(
                f"{where} is {entry.shape}; nothing is stored at {wanted.offset} of shape {wanted.shape}"
            )
        result, found = None, 0
        for stored in entry.slices:
            for part, first in stored.parts():
                if shared := part.intersection(wanted):
                    data = self._read_part(stored, shared.relative_to(part.offset), part, first)
                    result = data.new_empty(wanted.shape) if result is None else result
                    result[shared.relative_to(wanted.offset).index] = data
                    found += shared.numel
        if result is None or found != wanted.numel:
            raise CheckpointError(
                f"{where} has {found} of the {wanted.numel} values at {wanted.offset} of shape {wanted.shape}"
            )
        return result

    def _read_part(self, stored: StoredSlice, inner: TensorSlice, part: TensorSlice, first: int) -> "torch.Tensor":
        """Read `inner` of `part`, whose elements begin at `first` of a flattened entry."""
        entry = self._open(stored)
        if stored.range is None:
            whole: torch.Tensor = entry[inner.index]
            return whole
        width = prod(part.shape[1:])
        rows: torch.Tensor = entry[first + inner.offset[0] * width : first + inner.end[0] * width]
        return rows.view(-1, *part.shape[1:])[(slice(None), *inner.index[1:])]

    def _open(self, stored: StoredSlice) -> Any:
        if stored.file not in self._files:
            self._files[stored.file] = safe_open(self.folder / stored.file, framework="pt")
        return self._files[stored.file].get_slice(stored.entry)


def _tensor_of(name: str) -> str:
    """Return the tensor's name in the name of an optimizer state of it."""
    kind, _, rest = name.partition("/")
    return rest if kind.startswith("optimizer.") else name
