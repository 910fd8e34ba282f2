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
from megatron_hybrid.checkpoint.safetensors_header import ITEM_BYTES, StoredTensor
from megatron_hybrid.checkpoint.verification import Verify, find_damage, refuse_damage, share_of_files, warn_unchecked
from megatron_hybrid.convert.architecture import is_run_or_checkpoint
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.io.folder import regular_file
from megatron_hybrid.convert.io.source import TORCH_NAMES, FileSlice, TensorSource, as_matrix
from megatron_hybrid.convert.ranks import find_ranks


class CheckpointSource:
    """A checkpoint, or the newest of a run, whose index, files and model have been checked against each other."""

    def __init__(self, folder: Path, verify: Verify = "full") -> None:
        """Read the index, and compare the files with it.

        Args:
            verify: `full` compares their content, too. MPI ranks that share a conversion share this work.

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
            self._reader = CheckpointReader(folder, verify="sizes")
            self._reader.check_tensors()
            if verify == "full":
                self._verify()
        except CheckpointError as error:
            raise ConversionError(str(error)) from None
        self.index, self.model = self._reader.index, self._reader.model
        self.files = [folder / INDEX, *(regular_file(folder, name) for name in self.index.files)]
        for name in model_tensors(self.model):
            if (dtype := self.index.tensors[name].dtype) not in TORCH_NAMES:
                raise ConversionError(f"{folder}: {name} is {dtype}; weights must be one of {', '.join(TORCH_NAMES)}")

    def _verify(self) -> None:
        ranks, index = find_ranks(), self._reader.index
        share = share_of_files(index.all_files(), ranks.rank, ranks.size)
        refuse_damage(self.folder, find_damage(self.folder, index, share))
        if ranks.rank == 0:
            warn_unchecked(self.folder, index)

    def locate(self, stored: StoredSlice, entry: TensorEntry) -> StoredTensor:
        """Return the bytes that hold a stored slice.

        Raises:
            ConversionError: the file does not hold it as the index says.
        """
        try:
            return self._reader.locate(stored, entry)
        except CheckpointError as error:
            raise ConversionError(str(error)) from None

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
