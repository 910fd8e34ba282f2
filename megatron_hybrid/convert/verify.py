"""Verification of a checkpoint: hashes, coverage, finite values, and equality with a Hugging Face folder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.open_files import OpenFiles
from megatron_hybrid.checkpoint.safetensors_header import ITEM_BYTES, StoredTensor
from megatron_hybrid.checkpoint.verification import find_damage, warn_unchecked
from megatron_hybrid.convert.checkpoint_source import CheckpointSource
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.reader import HuggingFaceFolder, open_huggingface
from megatron_hybrid.convert.io.compare import TORCH_DTYPES, Difference, compare_blocks, rows_limit
from megatron_hybrid.convert.io.source import BLOCK_BYTES, TensorSource

Progress = Callable[[int], None]
_NO_EFFECT = {"eos_token_id", "pad_token_id", "init_std", "a_init_range", "dt_init_range", "dt_init_floor", "backend"}
"""Fields of ModelConfig and its sections that do not change what trained weights compute."""


@dataclass
class Verdict:
    """Result of a verification: what was checked, and problems."""

    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    compared: int = 0
    rounded: int = 0
    """Tensors that are equal only after a cast to the narrower of two types."""
    problems: list[str] = field(default_factory=list)


def verify(folder: Path, against: Path | None = None, progress: Progress = lambda count: None) -> Verdict:
    """Verify a checkpoint.

    Args:
        against: a Hugging Face folder that should hold the same weights.
        progress: called with the number of bytes read since the last call.

    Raises:
        ConversionError: a folder that cannot be read as a checkpoint at all.
    """
    ours = CheckpointSource(folder, verify="sizes")
    verdict = Verdict(files=len(ours.index.all_files()))
    verdict.problems += find_damage(ours.folder, ours.index, progress=progress).values()
    warn_unchecked(ours.folder, ours.index)
    theirs = open_huggingface(against, ours.model.eos_token_id) if against else None
    with OpenFiles(ConversionError) as files:
        for name in model_tensors(ours.model):
            _check_weight(ours, theirs, name, files, verdict, progress)
        for name, stored in ours.state_tensors():
            if not _is_finite(stored, files):
                verdict.problems.append(f"{name}: holds infinities or NaN")
            progress(stored.end - stored.begin)
    if theirs:
        _compare_models(ours, theirs, verdict)
    return verdict


def _check_weight(
    ours: CheckpointSource,
    theirs: HuggingFaceFolder | None,
    name: str,
    files: OpenFiles,
    verdict: Verdict,
    progress: Progress,
) -> None:
    try:
        source = ours.tensor(name)
    except ConversionError as error:
        verdict.problems.append(str(error))
        return
    verdict.tensors += 1
    verdict.nbytes += source.nbytes
    other = _counterpart(source, theirs, name, verdict) if theirs else None
    finite, difference = _compare(source, other, files, progress)
    if not finite:
        verdict.problems.append(f"{name}: holds infinities or NaN")
    if other and theirs:
        verdict.compared += 1
        verdict.rounded += difference == Difference.ROUNDING
        if difference == Difference.VALUES:
            verdict.problems.append(f"{name}: differs from {theirs.folder}")


def _counterpart(source: TensorSource, theirs: HuggingFaceFolder, name: str, verdict: Verdict) -> TensorSource | None:
    """Return the other folder's tensor, or None and add a problem if it has none of this shape."""
    other = theirs.sources.get(name)
    if other is not None and other.shape == source.shape:
        return other
    verdict.problems.append(
        f"{name}: {theirs.folder} has it as {other.shape if other else 'nothing'}, not {source.shape}"
    )
    return None


def _compare(
    source: TensorSource, other: TensorSource | None, files: OpenFiles, progress: Progress
) -> tuple[bool, Difference]:
    """Return whether a tensor is finite, and how it differs from another one."""
    limit = rows_limit(source.dtype, other.dtype if other else source.dtype)  # the same rows on both sides
    blocks = source.blocks(files, limit * ITEM_BYTES[source.dtype])
    other_blocks = other.blocks(files, limit * ITEM_BYTES[other.dtype]) if other else iter(())
    finite, difference = True, Difference.NONE
    for block in blocks:
        finite = finite and _all_finite(block, source.dtype)
        if other:
            difference = max(difference, compare_blocks(block, source.dtype, next(other_blocks), other.dtype))
        progress(len(block))
    return finite, difference


def _all_finite(block: memoryview, dtype: str) -> bool:
    return bool(torch.isfinite(torch.frombuffer(block, dtype=TORCH_DTYPES[dtype])).all())


def _is_finite(stored: StoredTensor, files: OpenFiles) -> bool:
    """Return whether all values are finite. Values that are not floating-point numbers are."""
    if stored.dtype not in TORCH_DTYPES:
        return True
    return all(_all_finite(block, stored.dtype) for block in _blocks(stored, files))


def _blocks(stored: StoredTensor, files: OpenFiles) -> Iterator[memoryview]:
    for begin in range(stored.begin, stored.end, BLOCK_BYTES):
        block = memoryview(bytearray(min(BLOCK_BYTES, stored.end - begin)))
        files.read_into(stored.path, begin, block)
        yield block


def _compare_models(ours: CheckpointSource, theirs: HuggingFaceFolder, verdict: Verdict) -> None:
    """Add a problem for each field in which the models compute something else from the same weights."""
    a, b = _computation(ours.model), _computation(theirs.model)
    for name in {**a, **b}:
        if (mine := a.get(name)) != (other := b.get(name)):
            verdict.problems.append(f"model.{name} is {mine!r}, and {other!r} in {theirs.folder}")


def _computation(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that change what trained weights compute, in one spelling."""
    fields: dict[str, Any] = _without(model.model_dump(mode="json"), _NO_EFFECT)
    fields["layer_pattern"] = "".join(model.layers)
    fields["head_dim"] = model.attention_head_dim
    fields["num_key_value_heads"] = model.kv_heads
    if model.rope_scaling:
        fields["rope_scaling"]["attention_factor"] = model.rope_scaling.effective_attention_factor
    return fields


def _without(value: Any, names: set[str]) -> Any:
    """Return a dictionary without these keys, at any depth."""
    if not isinstance(value, dict):
        return value
    return {name: _without(inner, names) for name, inner in value.items() if name not in names}
