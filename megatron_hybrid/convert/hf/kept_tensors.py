"""Tensors of a model that are no part of its language model, such as those of its vision tower.

An import keeps them in a safetensors file in the checkpoint's `original/` folder, and an export contains them unchanged. Training
copies the folder into its checkpoints (checkpoint/origin.py), so the file is small enough to be read whole.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.checkpoint.origin import FOLDER
from megatron_hybrid.checkpoint.safetensors_header import StoredTensor, read_header
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.base import Architecture
from megatron_hybrid.convert.io.folder import has_file, regular_file
from megatron_hybrid.convert.io.source import FileSlice, TensorSource
from megatron_hybrid.convert.io.writer import OutputTensor, header_bytes, in_file_order

KEPT_TENSORS = "kept_tensors.safetensors"


def _source(name: str, tensor: StoredTensor) -> TensorSource:
    columns = prod(tensor.shape[1:])
    rows = prod(tensor.shape) // max(1, columns)  # a scalar has one
    whole = FileSlice(tensor.path, tensor.begin, TensorSlice((0, 0), (rows, columns)))
    return TensorSource(name, tensor.dtype, tensor.shape, (whole,))


def _outputs(tensors: Mapping[str, StoredTensor]) -> list[OutputTensor]:
    return [
        OutputTensor(name, tensor.dtype, tensor.shape, lambda name=name, tensor=tensor: _source(name, tensor))  # type: ignore[misc]
        for name, tensor in tensors.items()
    ]


def tensors_file(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Return the content of a safetensors file with these tensors."""
    ordered = in_file_order(_outputs(tensors))
    return header_bytes(ordered) + b"".join(_content(tensors[output.name]) for output in ordered)


def _content(tensor: StoredTensor) -> bytes:
    with open(tensor.path, "rb") as file:
        file.seek(tensor.begin)
        return file.read(tensor.end - tensor.begin)


def kept_outputs(checkpoint: Path, architecture: Architecture) -> tuple[list[OutputTensor], list[Path]]:
    """Return the tensors that a checkpoint keeps for exports as `architecture`, and the files that were read.

    Raises:
        ConversionError: the file is damaged.
    """
    folder = checkpoint / FOLDER
    if architecture.kept_tensors is None or folder.is_symlink() or not has_file(folder, KEPT_TENSORS):
        return [], []
    path = regular_file(folder, KEPT_TENSORS)
    stored = read_header(path, ConversionError)
    return _outputs({name: tensor for name, tensor in stored.items() if architecture.keeps(name)}), [path]
