"""Reader of torch.distributed.checkpoint folders that runs no code of theirs.

Such a folder keeps its directory of tensors in a pickle (`.metadata`), and each slice of a tensor as `torch.save` wrote it
(saved_tensor.py). Both kinds of pickles are read by `restricted_pickle`. Numbers are read as bytes, at positions that are
checked against the files.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.base.errors import shown
from megatron_hybrid.checkpoint.safetensors_header import ITEM_BYTES
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.io.folder import has_file, regular_file
from megatron_hybrid.convert.io.source import FileSlice, TensorSource
from megatron_hybrid.convert.olmo_core.restricted_pickle import (
    METADATA_NAMES,
    ChunkStorageMetadata,
    StorageInfo,
    TensorStorageMetadata,
    restricted_load,
)
from megatron_hybrid.convert.olmo_core.saved_tensor import SavedSlice, locate_values

METADATA = ".metadata"
_MAX_METADATA_BYTES = 32 << 20
"""200,000 slices of tensors have 29 MB. A 7B model with its optimizer has 13 MB from 64 ranks, and a 70B model 25 MB."""
_NUMBERS = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}


@dataclass(frozen=True)
class TorchTensor:
    """A tensor of the folder."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[SavedSlice, ...]


class TorchCheckpoint:
    """A folder that torch.distributed.checkpoint, or OLMo-core's variant of it, wrote."""

    def __init__(self, folder: Path) -> None:
        """Raises:
        ConversionError: not such a folder, or its directory is damaged, unsafe or incomplete.
        """
        self.folder = folder
        path = folder / METADATA
        if not has_file(folder, METADATA) or path.is_symlink() or not path.is_file():
            raise ConversionError(
                f"{folder}: it has no {METADATA}; give the folder of a checkpoint, or its model_and_optim"
            )
        if path.stat().st_size > _MAX_METADATA_BYTES:
            raise ConversionError(
                f"{path}: larger than {_MAX_METADATA_BYTES >> 20} MiB, of about 200,000 slices of tensors; refused. If it is no "
                "damage, load the checkpoint on fewer ranks and save it again"
            )
        metadata = restricted_load(path.read_bytes(), METADATA_NAMES, str(path))
        try:
            places = {(index.fqn, index.offset): place for index, place in metadata.storage_data.items()}
            entries = metadata.state_dict_metadata.items()
            tensors = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
            self.tensors = {name: self._tensor(name, entry, places) for name, entry in tensors.items()}
            self.others = {name for name, _ in entries if name not in tensors}
        except (AttributeError, TypeError, KeyError, IndexError) as error:
            raise ConversionError(f"{path}: damaged ({type(error).__name__}: {str(error)[:200]})") from None
        self.files = [path, *sorted({part.path for tensor in self.tensors.values() for part in tensor.slices})]

    def _tensor(
        self, name: str, entry: TensorStorageMetadata, places: dict[tuple[str, Any], StorageInfo]
    ) -> TorchTensor:
        dtype, shape = entry.properties.state[0], tuple(entry.size)
        if dtype not in ITEM_BYTES or not _are_sizes(shape):
            raise ConversionError(
                f"{self.folder}: {name!r:.200} is of dtype {shown(dtype)} and shape {shown(shape)}; not readable"
            )
        return TorchTensor(dtype, shape, tuple(self._slice(name, shape, chunk, places) for chunk in entry.chunks))

    def _slice(
        self,
        name: str,
        shape: tuple[int, ...],
        chunk: ChunkStorageMetadata,
        places: dict[tuple[str, Any], StorageInfo],
    ) -> SavedSlice:
        part, where = TensorSlice(tuple(chunk.offsets), tuple(chunk.sizes)), f"{self.folder}: {name!r:.200}"
        place = places.get((name, part.offset))
        if place is None:
            raise ConversionError(f"{where} at {shown(part.offset)} is in no file; the checkpoint is incomplete")
        if place.transform_descriptors:
            raise ConversionError(f"{where} is compressed ({shown(place.transform_descriptors)}); not readable")
        numbers = (*part.offset, *part.shape, place.offset, place.length)
        same_rank = len(part.offset) == len(part.shape) == len(shape)
        if not same_rank or not _are_whole(numbers):
            raise ConversionError(f"{where} has a slice at {shown(part.offset)} of {shown(part.shape)}; damaged")
        path = regular_file(self.folder, place.relative_path)
        if place.offset + place.length > path.stat().st_size:
            raise ConversionError(f"{path}: shorter than {METADATA} says; the checkpoint is incomplete")
        return SavedSlice(part, path, place.offset, place.length)

    def source(self, key: str, name: str, shape: tuple[int, ...]) -> TensorSource:
        """Return the tensor `key` as one of `shape`, which may leave out dimensions of length 1.

        Raises:
            ConversionError: slices are damaged, or do not make up the tensor.
        """
        tensor = self.tensors[key]
        slices = []
        for saved in tensor.slices:
            if saved.slice.shape[2:] != tensor.shape[2:]:
                raise ConversionError(f"{self.folder}: {key} is split along dimension 2 or later; not readable")
            part = _as_matrix(saved.slice, tensor.shape)
            if part.numel:
                values = locate_values(key, tensor.dtype, saved)
                slices.append(FileSlice(values.path, values.begin, part))
        return TensorSource(name, tensor.dtype, shape, tuple(slices)).check()

    def scalar(self, key: str) -> float:
        """Return the value of a tensor of one element."""
        tensor = self.tensors[key]
        (saved,) = tensor.slices
        values = locate_values(key, tensor.dtype, saved)
        if tensor.dtype not in _NUMBERS:
            raise ConversionError(f"{self.folder}: {key} is {tensor.dtype}; a number was expected")
        with open(values.path, "rb") as file:
            file.seek(values.begin)
            number: float = struct.unpack(_NUMBERS[tensor.dtype], file.read(ITEM_BYTES[tensor.dtype]))[0]
        return number


def _as_matrix(part: TensorSlice, shape: tuple[int, ...]) -> TensorSlice:
    """Return a slice that is split along the first two dimensions at most as one of [rows, columns]."""
    if len(shape) < 2:
        return TensorSlice((*part.offset, 0, 0)[:2], (*part.shape, 1, 1)[:2])
    inner = prod(shape[2:])
    return TensorSlice((part.offset[0], part.offset[1] * inner), (part.shape[0], part.shape[1] * inner))


def _are_whole(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _are_sizes(values: tuple[Any, ...]) -> bool:
    return len(values) <= 8 and _are_whole(values)
