"""Checkpoints that no run wrote, converted or averaged: whole tensors, and an index."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.arch.tensors import TensorSpec
from megatron_hybrid.base import yaml_text
from megatron_hybrid.checkpoint.format import INDEX, Index, StoredSlice, TensorEntry, read_index
from megatron_hybrid.convert.io.writer import OutputTensor
from megatron_hybrid.convert.job import Facts, write_text

MAX_FILE_BYTES = 2_000_000_000
"""Largest file of such a checkpoint. There are then enough files for several ranks to share."""
CONVERTED_STATE: dict[str, Any] = {}
"""State of a checkpoint that has only weights. A run that loads it begins at step 0 with a new optimizer."""


def stored_dtype(spec: TensorSpec, stored: str, wanted: str | None) -> str:
    """Return the type in which a weight is kept: fp32 if it must be or was fp64, else the wanted type, else as stored."""
    return "F32" if spec.always_fp32 else wanted or ("F32" if stored == "F64" else stored)


def write_index(
    folder: Path,
    facts: Facts,
    files: Mapping[str, Sequence[OutputTensor]],
    model: ModelConfig,
    run: dict[str, Any],
    state: dict[str, Any],
) -> None:
    """Write the index of a checkpoint whose files exist, and model.yaml, the `model` section for a run.

    Args:
        facts: size and hash by file.
        run: origin of the weights, for the record (checkpoint/origin.py).

    Raises:
        CheckpointError: the checkpoint is not complete.
    """
    index = Index(model.architecture(), run, state)
    for name, tensors in files.items():
        index.files[name] = facts[name]
        for tensor in tensors:
            stored = StoredSlice(name, tensor.name, TensorSlice.whole(tensor.shape))
            index.tensors[tensor.name] = TensorEntry(tensor.dtype, tensor.shape, [stored])
    write_text(folder / "model.yaml", yaml_text.write({"model": index.model}))
    write_text(folder / INDEX, index.dump())
    read_index(folder)
