"""A checkpoint as sources of tensors, for code that copies bytes instead of loading tensors.

The checkpoint's reader (checkpoint/reader.py) interprets the format. This file adds what checkpoints of unknown origin need:
only regular files of the folder are opened, and headers are compared with the index.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.folders import find_checkpoint
from megatron_hybrid.checkpoint.format import INDEX, CheckpointError, StoredSlice, TensorEntry
from megatron_hybrid.checkpoint.reader import CheckpointReader
from megatron_hybrid.convert.architecture import is_run_or_checkpoint
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.io.folder import regular_file
from megatron_hybrid.convert.io.header import ITEM_BYTES, StoredTensor, read_header
from megatron_hybrid.convert.io.source import TORCH_NAMES, FileSlice, TensorSource, as_matrix


class CheckpointSource:
    """A checkpoint, or the newest of a run, whose index, files and model have been checked against each other."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ConversionError: not a checkpoint, damaged, unsafe, or not of the model in its index.
        """
        if not folder.is_dir():
            raise ConversionError(
                f"{folder}: there is no such folder; give a checkpoint such as RUN/checkpoints/step-00001000"
            )
        if not (folder / INDEX).exists() and is_run_or_checkpoint(folder):
            folder = find_checkpoint(str(folder), "checkpoint")
        self.folder = folder
        regular_file(folder, INDEX)
        try:
            self._reader = CheckpointReader(folder)
            self._reader.check_tensors()
        except CheckpointError as error:
            raise ConversionError(str(error)) from None
        self.index, self.model = self._reader.index, self._reader.model
        self.files = [folder / INDEX, *(regular_file(folder, name) for name in self.index.files)]
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        for name in model_tensors(self.model):
            if (dtype := self.index.tensors[name].dtype) not in TORCH_NAMES:
                raise ConversionError(f"{folder}: {name} is {dtype}; weights must be one of {', '.join(TORCH_NAMES)}")

    def locate(self, stored: StoredSlice, entry: TensorEntry) -> StoredTensor:
        """Return the bytes that hold a stored slice.

        Raises:
            ConversionError: the file does not hold it as the index says.
        """
        if stored.file not in self.index.files:
            raise ConversionError(f"{self.folder}: {stored.entry} is in {stored.file}, which the index does not list")
        if stored.file not in self._headers:
            self._headers[stored.file] = read_header(self.folder / stored.file)
        found = self._headers[stored.file].get(stored.entry)
        if found is None or found.dtype != entry.dtype or found.shape != stored.stored_shape:
            what = f"{found.dtype} {list(found.shape)}" if found else "nothing"
            raise ConversionError(
                f"{self.folder / stored.file}: {stored.entry} is {what}; the index says {entry.dtype} "
                f"{list(stored.stored_shape)}"
            )
        return found

    def tensor(self, name: str) -> TensorSource:
        """Return a weight, or an optimizer state of one.

        Raises:
            ConversionError: its slices are not in the files, overlap, or do not cover it.
        """
        entry = self.index.tensors[name]
        slices = tuple(part for stored in entry.slices for part in self._file_slices(stored, entry))
        return TensorSource(name, entry.dtype, entry.shape, slices).check()

    def _file_slices(self, stored: StoredSlice, entry: TensorEntry) -> Iterator[FileSlice]:
        found = self.locate(stored, entry)
        for part, first in stored.parts():
            yield FileSlice(found.path, found.begin + first * ITEM_BYTES[entry.dtype], as_matrix(part))

    def precise_tensor(self, name: str) -> TensorSource:
        """Return a weight's fp32 master if the checkpoint has one, else the weight."""
        return self.tensor(self._reader.most_precise(name))

    def state_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield name and bytes of every stored slice that is not a weight.

        Raises:
            ConversionError: as `locate`.
        """
        weights = model_tensors(self.model)
        for name, entry in self.index.tensors.items():
            if name not in weights:
                for stored in entry.slices:
                    yield name, self.locate(stored, entry)
