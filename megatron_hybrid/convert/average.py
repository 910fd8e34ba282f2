"""Average of checkpoints, computed a few MB at a time.

Values are multiplied, added and divided in fp64, and rounded to fp32 once. A weight's value is that of its fp32 master where a
checkpoint has one. The average holds the rounded value as the weight and the fp32 value as its master, as training saves them.
Scales of FP8 are left out: training makes its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.arch.optimizers.spec import MASTER
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.folders import complete_checkpoints
from megatron_hybrid.checkpoint.format import state_name
from megatron_hybrid.checkpoint.open_files import OpenFiles
from megatron_hybrid.checkpoint.origin import FOLDER, Origin
from megatron_hybrid.checkpoint.safetensors_header import ITEM_BYTES
from megatron_hybrid.convert.checkpoint_output import MAX_FILE_BYTES, write_index
from megatron_hybrid.convert.checkpoint_source import CheckpointSource
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.io.compare import TORCH_DTYPES
from megatron_hybrid.convert.io.source import TensorSource
from megatron_hybrid.convert.io.writer import OutputTensor
from megatron_hybrid.convert.job import Conversion, Facts, split_into_files

_BLOCK_BYTES = 1 << 20
"""Bytes of a block of the mean. Its sums in fp64 then fit in a processor's cache."""
_MASTERS = state_name(MASTER, "")


@dataclass(frozen=True)
class AveragedSource(TensorSource):
    """Weighted mean of tensors of one shape, in fp32. It has no slices of its own."""

    parts: tuple[TensorSource, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def contiguous(self) -> bool:
        """Return False: no file holds these values, so none can be copied."""
        return False

    def blocks(self, files: OpenFiles, limit: int = _BLOCK_BYTES) -> Iterator[memoryview]:
        """Yield the mean's bytes in order, whole rows at a time.

        Raises:
            ConversionError: a value is infinite or NaN.
        """
        readers = [part.blocks(files, limit // 4 * ITEM_BYTES[part.dtype]) for part in self.parts]
        step = max(1, limit // 4 // max(1, self.columns))
        total, product = torch.empty(2, step * self.columns, dtype=torch.float64)
        for first in range(0, self.rows, step):
            count = (min(first + step, self.rows) - first) * self.columns
            mean = self._mean(readers, total[:count], product[:count])
            if not bool(torch.isfinite(mean).all()):
                raise ConversionError(
                    f"{self.name}: the average holds infinities or NaN; megatron-hybrid verify finds the checkpoint at fault"
                )
            yield memoryview(mean.view(torch.uint8).numpy()).cast("B")

    def _mean(self, readers: list[Iterator[memoryview]], total: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """Return the mean of the next blocks. The memory of `total` and `product` is used on the way."""
        total.zero_()
        for reader, part, weight in zip(readers, self.parts, self.weights, strict=True):
            values = torch.frombuffer(next(reader), dtype=TORCH_DTYPES[part.dtype])
            product.copy_(values)  # the next read may reuse the block
            total.add_(product if weight == 1 else product.mul_(weight))
        return total.div_(sum(self.weights)).float()


def newest_checkpoints(run_dir: Path, count: int) -> list[Path]:
    """Return the newest `count` checkpoints of a run, oldest first.

    Raises:
        ConversionError: it has fewer.
    """
    found = complete_checkpoints(run_dir / "checkpoints") or complete_checkpoints(run_dir)
    if len(found) < count:
        raise ConversionError(
            f"{run_dir}: {len(found)} complete checkpoints, and --last asks for {count}; give a smaller number, or train with a "
            "larger checkpoint.keep_last"
        )
    return found[-count:]


def average(
    folders: Sequence[Path], target: Path, weights: Sequence[float] | None = None, moments: bool = False
) -> Conversion:
    """Plan the average of checkpoints. Nothing is written yet.

    Args:
        weights: weight of each checkpoint, positive; None: equal.
        moments: also average the optimizer's moments. The average then has the smallest number of updates among its inputs.

    Raises:
        ConversionError: a folder is no checkpoint; fewer than two; weights that do not fit; or checkpoints of different models,
            tokenizers, tensors or types. Names the first difference.
    """
    given = tuple(weights) if weights else (1.0,) * len(folders)
    _check_request(folders, given)
    sources = [CheckpointSource(folder) for folder in folders]
    first = sources[0]
    for other in sources[1:]:
        _check_alike(first, other)
    outputs = [*_weights(sources, given), *(_moments(sources, given) if moments else ())]
    files = split_into_files(outputs, MAX_FILE_BYTES)
    averaged = [{"checkpoint": str(folder), "weight": weight} for folder, weight in zip(folders, given, strict=True)]
    run = {**first.index.run, "averaged": averaged}

    def finish(written: Path, facts: Facts) -> None:
        Origin.of(first.folder, {}).write(written)
        write_index(written, facts, files, first.model, run, _state(sources, moments))

    read = [path for source in sources for path in source.files]
    return Conversion(target, files, read, with_hash=True, finish=finish)


def _check_request(folders: Sequence[Path], weights: tuple[float, ...]) -> None:
    if len(folders) < 2:
        raise ConversionError(f"{len(folders)} checkpoint: an average needs at least two; name another")
    if len(weights) != len(folders):
        raise ConversionError(f"--weights: {len(weights)} for {len(folders)} checkpoints; give one for each")
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise ConversionError(
                f"--weights: {weight:g} is not a positive number; leave that checkpoint out, or give one"
            )


def _check_alike(one: CheckpointSource, other: CheckpointSource) -> None:
    """Check that two checkpoints are of one model with one vocabulary, and that their weights have the same types.

    Raises:
        ConversionError: names the first difference.
    """

    def refuse(what: str, mine: object, theirs: object, remedy: str = "their token ids mean other text") -> None:
        if mine != theirs:
            raise ConversionError(
                f"{what} is {mine!r:.200} in {one.folder} and {theirs!r:.200} in {other.folder}; {remedy}"
            )

    ours, theirs = one.model.architecture(), other.model.architecture()
    for field in {**ours, **theirs}:
        refuse(f"model.{field}", ours.get(field), theirs.get(field), "only checkpoints of one model can be averaged")
    mine, theirs_known = (source.index.state.get("vocabulary") for source in (one, other))
    if mine and theirs_known:
        refuse("the vocabulary (data.tokenizer)", mine, theirs_known)
    first, second = (source.folder / FOLDER / "tokenizer.json" for source in (one, other))
    if first.is_file() and second.is_file():
        refuse(
            f"{FOLDER}/tokenizer.json", sha256(first.read_bytes()).hexdigest(), sha256(second.read_bytes()).hexdigest()
        )
    for name in model_tensors(one.model):
        stored, other_type = (source.index.tensors[name].dtype for source in (one, other))
        refuse(f"the type of {name}", stored, other_type, "convert one of them to the other's type")


def _weights(sources: Sequence[CheckpointSource], weights: tuple[float, ...]) -> Iterator[OutputTensor]:
    """Yield the weights, and their masters where a checkpoint has them."""
    for name, spec in model_tensors(sources[0].model).items():
        mean = AveragedSource(name, "F32", spec.shape, (), tuple(s.precise_tensor(name) for s in sources), weights)
        yield OutputTensor(name, sources[0].index.tensors[name].dtype, spec.shape, lambda mean=mean: mean)  # type: ignore[misc]
        master = state_name(MASTER, name)
        if any(master in source.index.tensors for source in sources):
            yield OutputTensor(master, "F32", spec.shape, lambda mean=mean: mean)  # type: ignore[misc]


def _moments(sources: Sequence[CheckpointSource], weights: tuple[float, ...]) -> Iterator[OutputTensor]:
    """Yield the moments.

    Raises:
        ConversionError: a checkpoint lacks one that another has, or has none, or does not tell its number of updates.
    """
    held = [
        [name for name in s.index.tensors if name.startswith("optimizer.") and not name.startswith(_MASTERS)]
        for s in sources
    ]
    for source, names in zip(sources, held, strict=True):
        if absent := set(held[0]).symmetric_difference(names):
            raise ConversionError(
                f"--moments: {min(absent)} is not in both {sources[0].folder} and {source.folder}; leave it out"
            )
        if not names or "updates" not in source.index.state:
            raise ConversionError(f"--moments: {source.folder} holds no moments of an optimizer; leave it out")
    for name in held[0]:
        parts = tuple(source.tensor(name) for source in sources)
        for part, source in zip(parts, sources, strict=True):
            if part.shape != parts[0].shape:
                raise ConversionError(
                    f"{name} is {parts[0].shape} in {sources[0].folder} and {part.shape} in {source.folder}"
                )
        mean = AveragedSource(name, "F32", parts[0].shape, (), parts, weights)
        yield OutputTensor(name, "F32", parts[0].shape, lambda mean=mean: mean)  # type: ignore[misc]


def _state(sources: Sequence[CheckpointSource], moments: bool) -> dict[str, Any]:
    """Return the state of the average: a new run begins at step 0, and knows the vocabulary and the updates of its moments."""
    known = [vocabulary for source in sources if (vocabulary := source.index.state.get("vocabulary"))]
    state: dict[str, Any] = {"vocabulary": known[0]} if known else {}
    return state | ({"updates": min(source.index.state["updates"] for source in sources)} if moments else {})
