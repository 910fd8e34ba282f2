"""Our own checkpoints, written and read by conversions: weights in whole tensors, no layout."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.base import yaml_text
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.checkpoint.format import (
    INDEX,
    CheckpointError,
    Index,
    Shard,
    TensorEntry,
    read_index,
    state_name,
)
from megatron_hybrid.config.translate import translate
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.folder import regular_file
from megatron_hybrid.convert.job import Facts, write_text
from megatron_hybrid.convert.safetensors_header import ITEM_BYTES, StoredTensor, read_header
from megatron_hybrid.convert.safetensors_writer import OutputTensor
from megatron_hybrid.convert.source import TORCH_NAMES, StoredBox, TensorSource, flattened_range

CONVERTED_STATE: dict[str, Any] = {}
"""The state of a checkpoint of weights alone: a run that loads it begins at step 0 with a fresh optimizer."""


def write_index(
    folder: Path,
    facts: Facts,
    files: dict[str, list[OutputTensor]],
    model: ModelConfig,
    origin: dict[str, Any],
    state: dict[str, Any],
) -> None:
    """Write the index of a converted checkpoint, and model.yaml: the `model` that a run's configuration must say. The files
    are there.

    Args:
        facts: size and hash by file. origin: what it was converted from, for the record: `run.converted_from`.

    Raises:
        CheckpointError: it is not complete.
    """
    index = Index(model.architecture(), {"converted_from": origin}, state)
    for name, tensors in files.items():
        index.files[name] = facts[name]
        for t in tensors:
            box = Shard(name, t.name, (0,) * len(t.shape), t.shape)
            index.tensors[t.name] = TensorEntry(t.dtype, t.shape, [box])
    write_text(folder / "model.yaml", yaml_text.write({"model": index.model}))
    write_text(folder / INDEX, index.dump())
    read_index(folder)


def stored_model(model: dict[str, Any], where: str) -> ModelConfig:
    """The model that a checkpoint of ours says it holds.

    Raises:
        ConversionError: not a valid configuration.
    """
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        raise ConversionError(f"{where}: its model is not valid: {str(translate(error, ModelConfig))[:2000]}") from None
    except (ConfigError, ValueError) as error:
        raise ConversionError(f"{where}: its model is not valid: {error!s:.500}") from None


class OurCheckpoint:
    """A checkpoint of ours, its index and headers checked against each other and against its model."""

    def __init__(self, folder: Path):
        """
        Raises:
            ConversionError: not a checkpoint, damaged, unsafe, or not of the model it says.
        """
        if not folder.is_dir():
            raise ConversionError(
                f"{folder}: there is no such folder; give a checkpoint such as RUN/checkpoints/step-00001000"
            )
        self.folder = folder
        try:
            regular_file(folder, INDEX)
            self.index = read_index(folder)
        except CheckpointError as error:
            raise ConversionError(str(error)) from None
        self.model = stored_model(self.index.model, str(folder))
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        self.files = [folder / INDEX, *(regular_file(folder, name) for name in self.index.files)]
        self._check_names()

    def _check_names(self) -> None:
        specs = model_tensors(self.model)
        for name, spec in specs.items():
            entry = self.index.tensors.get(name)
            if entry is None:
                raise ConversionError(f"{self.folder}: tensor {name} is missing")
            if entry.shape != spec.shape or entry.dtype not in TORCH_NAMES:
                raise ConversionError(
                    f"{self.folder}: {name} is {entry.dtype} {list(entry.shape)}, and {list(spec.shape)} by its model"
                )
        for name in self.index.tensors:
            kind, _, rest = name.partition("/")
            if kind == "fp8":  # scales of a run in FP8: they are the layers', not the model's
                continue
            if (rest if kind.startswith("optimizer.") else name) not in specs:
                raise ConversionError(f"{self.folder}: {name!r:.200} is not a tensor of its model")

    def stored(self, shard: Shard, name: str) -> StoredTensor:
        """Where a shard lies.

        Raises:
            ConversionError: the file does not hold it as the index says.
        """
        if shard.file not in self.index.files:
            raise ConversionError(f"{self.folder}: {name} lies in {shard.file}, which the index does not list")
        if shard.file not in self._headers:
            self._headers[shard.file] = read_header(self.folder / shard.file)
        found = self._headers[shard.file].get(shard.entry)
        dtype = self.index.tensors[name].dtype
        shape = shard.shape if shard.range is None else (shard.numel,)
        if found is None or found.dtype != dtype or found.shape != shape:
            what = f"{found.dtype} {list(found.shape)}" if found else "nothing"
            raise ConversionError(
                f"{self.folder / shard.file}: {shard.entry} is {what}; the index says {dtype} {list(shape)}"
            )
        return found

    def source(self, name: str) -> TensorSource:
        """A weight, or an optimizer state of one, put together from its shards.

        Raises:
            ConversionError: shards that are not there, overlap or leave something out.
        """
        entry = self.index.tensors[name]
        boxes = []
        for shard in entry.shards:
            stored = self.stored(shard, name)
            rows, *columns = zip(shard.offset, shard.shape, strict=True)
            column, width = columns[0] if columns else (0, 1)
            box = StoredBox(stored.path, stored.begin, rows[0], rows[1], column, width)
            boxes += flattened_range(box, ITEM_BYTES[entry.dtype], *shard.range) if shard.range else [box]
        return TensorSource(name, entry.dtype, entry.shape, tuple(boxes)).check()

    def precise_source(self, name: str) -> TensorSource:
        """A weight in fp32: the optimizer's master, of which the weight is a rounded copy, where the checkpoint has one."""
        master = state_name("master", name)
        return self.source(master if master in self.index.tensors else name)

    def sources(self) -> dict[str, TensorSource]:
        """Every weight of the model."""
        return {name: self.source(name) for name in model_tensors(self.model)}

    def other_shards(self) -> Iterable[tuple[str, Shard]]:
        """(name, shard) of the optimizer's state."""
        weights = model_tensors(self.model)
        for name, entry in self.index.tensors.items():
            if name not in weights:
                yield from ((name, shard) for shard in entry.shards)
