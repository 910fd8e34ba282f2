"""The reader of checkpoints. Training, conversion, verification and evaluation use it, and nothing else reads the format.

- `CheckpointReader.read`: one slice of one tensor, whatever layout wrote it.
- `CheckpointReader.stored`: where a tensor's values lie, for code that copies bytes instead of loading tensors.

torch is imported when the first tensor is read, not before.
"""

from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.optimizers.spec import MASTER
from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.format import CheckpointError, StoredSlice, TensorEntry, state_name
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.checkpoint.open_files import OpenFiles
from megatron_hybrid.checkpoint.safetensors_header import ITEM_BYTES, TORCH_NAMES, StoredTensor, read_header
from megatron_hybrid.checkpoint.verification import Verify, find_damage, refuse_damage, warn_unchecked

if TYPE_CHECKING:
    import torch

FP8_PREFIX = "fp8/"
"""Prefix of the scales that a run in FP8 saves. They belong to layers, not to tensors of the model."""


class CheckpointReader:
    """An open checkpoint. It reads only the bytes that are asked for. Use it in a `with`, or close it."""

    def __init__(self, folder: str | Path, verify: Verify = "full") -> None:
        """Open a checkpoint.

        Args:
            verify: `full` compares all files with the hashes in the index. `sizes` is for callers that have done so, or that
                accept damaged values.

        Raises:
            CheckpointError: not a checkpoint, or a damaged one.
        """
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        if verify == "full":
            refuse_damage(self.folder, find_damage(self.folder, self.index))
            warn_unchecked(self.folder, self.index)
        self._files = OpenFiles(CheckpointError)
        self._headers: dict[str, dict[str, StoredTensor]] = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._files.close()

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
        stored = self._header(f"rank-{rank:05d}.safetensors")
        return {
            name.removeprefix("local."): self._read_rows(tensor, tensor.shape, TensorSlice.whole(tensor.shape))
            for name, tensor in stored.items()
            if name.startswith("local.")
        }

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
                    data = self._read_part(self.locate(stored, entry), shared.relative_to(part.offset), part, first)
                    result = data.new_empty(wanted.shape) if result is None else result
                    result[shared.relative_to(wanted.offset).index] = data
                    found += shared.numel
        if result is None or found != wanted.numel:
            raise CheckpointError(
                f"{where} has {found} of the {wanted.numel} values at {wanted.offset} of shape {wanted.shape}"
            )
        return result

    def locate(self, stored: StoredSlice, entry: TensorEntry) -> StoredTensor:
        """Return the bytes that hold a stored slice.

        Raises:
            CheckpointError: the file does not hold it as the index says.
        """
        found = self._header(stored.file).get(stored.entry)
        if found is None or found.dtype != entry.dtype or found.shape != stored.stored_shape:
            what = f"{found.dtype} {list(found.shape)}" if found else "nothing"
            raise CheckpointError(
                f"{self.folder / stored.file}: {stored.entry!r:.200} is {what}; the index says {entry.dtype} "
                f"{list(stored.stored_shape)}; use an earlier checkpoint"
            )
        return found

    def _header(self, file: str) -> dict[str, StoredTensor]:
        if file not in self.index.files:
            raise CheckpointError(
                f"{self.folder}: the index does not list {file}, which is needed; use an earlier checkpoint"
            )
        if file not in self._headers:
            self._headers[file] = read_header(self.folder / file, CheckpointError)
        return self._headers[file]

    def _read_part(self, found: StoredTensor, inner: TensorSlice, part: TensorSlice, first: int) -> "torch.Tensor":
        """Read `inner` of `part`, whose elements begin at `first` of a stored entry."""
        begin = found.begin + first * ITEM_BYTES[found.dtype]
        return self._read_rows(replace(found, begin=begin), part.shape, inner)

    def _read_rows(self, found: StoredTensor, shape: tuple[int, ...], inner: TensorSlice) -> "torch.Tensor":
        """Read `inner` of a tensor of this shape, which is stored row-major from byte `found.begin`."""
        import torch

        result = torch.empty(inner.shape, dtype=getattr(torch, TORCH_NAMES[found.dtype]))
        if not result.numel():
            return result
        buffer = memoryview(result.reshape(-1).view(torch.uint8).numpy())
        item = ITEM_BYTES[found.dtype]
        width, place = prod(shape[1:]) * item, inner.offset[0] if inner.offset else 0
        if inner.shape[1:] == shape[1:]:
            self._files.read_into(found.path, found.begin + place * width, buffer)
            return result
        columns, before = prod(inner.shape[1:]) * item, inner.offset[1] * prod(shape[2:]) * item
        for row in range(inner.shape[0]):  # slices are never split along further dimensions
            at = found.begin + (place + row) * width + before
            self._files.read_into(found.path, at, buffer[row * columns : (row + 1) * columns])
        return result


def _tensor_of(name: str) -> str:
    """Return the tensor's name in the name of an optimizer state of it."""
    kind, _, rest = name.partition("/")
    return rest if kind.startswith("optimizer.") else name
