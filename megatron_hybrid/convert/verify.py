"""Whether a checkpoint is what it says: hashes, coverage, finite values, and equality with a Hugging Face folder."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.convert.compare import TORCH_DTYPES, Difference, compare_blocks, rows_limit
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf_reader import HuggingFaceFolder, open_huggingface
from megatron_hybrid.convert.our_files import OurCheckpoint
from megatron_hybrid.convert.safetensors_header import ITEM_BYTES
from megatron_hybrid.convert.source import BLOCK_BYTES, OpenFiles


@dataclass
class Verdict:
    """What was looked at, and what is wrong with it."""

    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    compared: int = 0
    rounded: int = 0
    """Tensors equal only after one side is cast to the other's narrower type."""
    problems: list[str] = field(default_factory=list)


def verify(folder: Path, against: Path | None = None, progress: Callable[[int], None] = lambda count: None) -> Verdict:
    """Check a checkpoint of ours.

    Args:
        against: a Hugging Face folder that should hold the same weights.

    Raises:
        ConversionError: a folder that cannot be read as a checkpoint at all.
    """
    ours = OurCheckpoint(folder)
    verdict = Verdict()
    _hashes(ours, verdict, progress)
    theirs = open_huggingface(against, ours.model.eos_token_id) if against else None
    with OpenFiles() as files:
        for name in model_tensors(ours.model):
            _weight(ours, theirs, name, files, verdict, progress)
        for name, shard in ours.other_shards():
            stored = ours.stored(shard, name)
            _finite_bytes(stored.path, stored.begin, _count(stored.shape), stored.dtype, name, files, verdict)
            progress(stored.end - stored.begin)
    _coverage(ours, verdict)
    if theirs:
        _same_model(ours, theirs, verdict)
    return verdict


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _hashes(ours: OurCheckpoint, verdict: Verdict, progress: Callable[[int], None]) -> None:
    for name, facts in ours.index.files.items():
        verdict.files += 1
        wanted = facts.get("sha256")
        digest = hashlib.sha256()
        with open(ours.folder / name, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                progress(len(block))
        if digest.hexdigest() != wanted:
            verdict.problems.append(
                f"{name}: its SHA-256 is {digest.hexdigest()}; {wanted} was written: the file has changed"
            )


def _weight(
    ours: OurCheckpoint, theirs: HuggingFaceFolder | None, name: str, files: OpenFiles, verdict: Verdict, progress
) -> None:
    try:
        source = ours.source(name)
    except ConversionError as error:
        verdict.problems.append(str(error))
        return
    verdict.tensors += 1
    verdict.nbytes += source.nbytes
    other = theirs.sources.get(name) if theirs else None
    if theirs and (other is None or other.shape != source.shape):
        verdict.problems.append(
            f"{name}: {theirs.folder} has it as {other.shape if other else 'nothing'}, not {source.shape}"
        )
        other = None
    limit = rows_limit(source.dtype, other.dtype if other else source.dtype)  # the same rows on both sides
    mine = source.blocks(files, limit * ITEM_BYTES[source.dtype])
    other_blocks = other.blocks(files, limit * ITEM_BYTES[other.dtype]) if other else None
    finite, difference = True, Difference.NONE
    for block in mine:
        finite = finite and bool(torch.isfinite(torch.frombuffer(block, dtype=TORCH_DTYPES[source.dtype])).all())
        if other_blocks and other:
            difference = max(difference, compare_blocks(block, source.dtype, next(other_blocks), other.dtype))
        progress(len(block))
    if not finite:
        verdict.problems.append(f"{name}: holds infinities or NaN")
    if other:
        verdict.compared += 1
        verdict.rounded += difference == Difference.ROUNDING
        if difference == Difference.VALUES:
            verdict.problems.append(f"{name}: differs from {theirs.folder if theirs else ''}")


def _finite_bytes(path: Path, at: int, count: int, dtype: str, name: str, files: OpenFiles, verdict: Verdict) -> None:
    if dtype not in TORCH_DTYPES:
        return
    item = ITEM_BYTES[dtype]
    step = BLOCK_BYTES // item
    for first in range(0, count, step):
        block = bytearray((min(first + step, count) - first) * item)
        files.read_into(path, at + first * item, memoryview(block))
        if not torch.isfinite(torch.frombuffer(block, dtype=TORCH_DTYPES[dtype])).all():
            verdict.problems.append(f"{name}: holds infinities or NaN")
            return


def _coverage(ours: OurCheckpoint, verdict: Verdict) -> None:
    """Optimizer state too holds every value (weights were checked box by box)."""
    for name, entry in ours.index.tensors.items():
        held, total = sum(shard.numel for shard in entry.shards), _count(entry.shape)
        if held != total:
            verdict.problems.append(f"{name}: its shards hold {held} of {total} values")


def _same_model(ours: OurCheckpoint, theirs: HuggingFaceFolder, verdict: Verdict) -> None:
    """Fields on which the result of the same weights depends."""
    ignored = {"eos_token_id", "pad_token_id", "init_std", "backend"}
    a, b = (m.model_dump(mode="json", exclude=ignored) for m in (ours.model, theirs.model))
    for section, side in ((a, ours.model), (b, theirs.model)):
        gdn = section.get("gdn")
        if gdn:
            for name in ("a_init_range", "dt_init_range", "dt_init_floor"):
                gdn.pop(name)
        section["layer_pattern"] = "".join(side.layers)
        section["head_dim"] = side.attention_head_dim
        section["num_key_value_heads"] = side.kv_heads
        if side.rope_scaling:
            section["rope_scaling"]["attention_factor"] = side.rope_scaling.effective_attention_factor
    verdict.problems += [f"model.{n} is {a[n]!r}, and {b[n]!r} in {theirs.folder}" for n in a if a[n] != b[n]]
