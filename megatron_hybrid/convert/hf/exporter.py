"""Export of a checkpoint to a Hugging Face folder."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.checkpoint.format import Index
from megatron_hybrid.checkpoint.origin import FOLDER, longest_sequence
from megatron_hybrid.convert.checkpoint_source import CheckpointSource
from megatron_hybrid.convert.hf.card import model_card
from megatron_hybrid.convert.hf.config import DEFAULT_POSITIONS, hf_from_model, language_fields
from megatron_hybrid.convert.hf.kept_tensors import kept_outputs
from megatron_hybrid.convert.hf.names import TheirTensor
from megatron_hybrid.convert.hf.original_files import (
    GENERATION_CONFIG,
    generation_config,
    given_tokenizer,
    kept_files,
    processor_files,
)
from megatron_hybrid.convert.hf.registry import architecture_for
from megatron_hybrid.convert.hf.weight_files import INDEX, SINGLE
from megatron_hybrid.convert.io.source import TORCH_NAMES, TensorSource, composed
from megatron_hybrid.convert.io.writer import OutputTensor
from megatron_hybrid.convert.job import Conversion, Facts, split_into_files, write_text
from megatron_hybrid.data.agreement import checkpoint_disagreements, refuse

MAX_SHARD_BYTES = 5_000_000_000


def to_huggingface(
    checkpoint: Path,
    target: Path,
    dtype: str | None = None,
    all_dtype: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer: Path | None = None,
    positions: int | None = None,
) -> Conversion:
    """Plan the conversion of a checkpoint to a Hugging Face folder. Nothing is written yet.

    Args:
        dtype: type of the weights by its name in safetensors (F32, BF16); None: as they are. F32 takes the optimizer's fp32
            masters if the checkpoint has them, because the weights of a bf16 run are rounded copies.
        all_dtype: store A_log and dt_bias in `dtype`, too; by default they stay fp32. Without `dtype`, those of a converted model
            that was not trained have the type of the folder that they come from.
        tokenizer: folder whose tokenizer files are copied; None: those of the model that was converted, if any.
        positions: max_position_embeddings; None: the longest of the runs' sequence lengths and the original model's.

    Raises:
        ConversionError: a damaged checkpoint, a model that transformers cannot compute, or no tokenizer in the folder.
        DataError: the tokenizer has more ids than the model, or is not the one that the model was trained with.
    """
    source = CheckpointSource(checkpoint)
    model, run = source.model, source.index.run
    whole_origin = _original_config(run)
    architecture = architecture_for(model, whole_origin.get("model_type"))
    origin = language_fields(whole_origin)
    find, specs = source.precise_tensor if dtype == "F32" else source.tensor, model_tensors(model)
    types = {name: "F32" for name, spec in specs.items() if spec.always_fp32 and not all_dtype}
    types |= {name: "BF16" for name in _in_bf16(source.index, dtype) if name in types}
    tensors = [_output(theirs, find, types, dtype) for theirs in architecture.names(model).all()]
    weights_dtype = TORCH_NAMES[max(tensors, key=lambda t: t.nbytes).dtype]
    chosen, notes = (positions, []) if positions else _positions(run, origin)
    config = hf_from_model(model, weights_dtype, chosen, whole_origin, architecture)
    others, other_files = kept_outputs(source.folder, architecture)
    files = split_into_files([*tensors, *others], max_shard_bytes)
    if len(files) == 1:
        files = {SINGLE: next(iter(files.values()))}
    kept = kept_files(source.folder)
    generation, more_notes = generation_config(architecture.language_config(config), kept.pop(GENERATION_CONFIG, None))
    copied = given_tokenizer(tokenizer) | processor_files(source.folder / FOLDER) if tokenizer else kept
    disagreements = checkpoint_disagreements(model, run, str(tokenizer) if tokenizer else None)
    notes += [*more_notes, *architecture.export_notes(model), *refuse(disagreements)]
    texts = {
        **({INDEX: _as_json(_weight_map(files))} if len(files) > 1 else {}),
        "config.json": _as_json(config),
        GENERATION_CONFIG: _as_json(generation),
        "README.md": model_card(model, architecture, config, source.index, bool(copied)),
    }
    finish = _finisher(texts, copied)
    read = [*source.files, *other_files, *copied.values()]
    return Conversion(target, files, read, with_hash=False, finish=finish, notes=notes)


def _finisher(texts: Mapping[str, str], copied: Mapping[str, Path]) -> Callable[[Path, Facts], None]:
    """Return the function that writes the files next to the weights."""

    def finish(written: Path, _: Facts) -> None:
        for name, text in texts.items():
            write_text(written / name, text)
        for name, path in copied.items():
            (written / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, written / name)

    return finish


def _as_json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


def _weight_map(files: Mapping[str, list[OutputTensor]]) -> dict[str, Any]:
    """Return the content of model.safetensors.index.json."""
    weight_map = {tensor.name: file for file, group in files.items() for tensor in group}
    total = sum(tensor.nbytes for group in files.values() for tensor in group)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _in_bf16(index: Index, dtype: str | None) -> list[str]:
    """Return the tensors that were BF16 in the folder of which the checkpoint is a conversion.

    There are none if it was trained or averaged since.
    """
    origin = index.run.get("converted_from")
    is_untouched = not index.state and "averaged" not in index.run
    names = origin.get("bf16") if isinstance(origin, dict) and is_untouched and dtype is None else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _output(
    theirs: TheirTensor, find: Callable[[str], TensorSource], types: Mapping[str, str], dtype: str | None
) -> OutputTensor:
    fixed = next((types[rows.ours] for rows in theirs.rows if rows.ours in types), None)
    sources = {rows.ours: find(rows.ours) for rows in theirs.rows}
    source = composed(theirs.name, theirs.shape, [(sources[r.ours], r.first, r.count) for r in theirs.rows])
    return OutputTensor(theirs.name, fixed or dtype or source.dtype, theirs.shape, lambda: source)


def _original_config(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json that the checkpoint was converted from, or an empty one."""
    origin = run.get("converted_from")
    config = origin.get("config") if isinstance(origin, dict) and origin.get("format") == "huggingface" else None
    return config if isinstance(config, dict) else {}


def _positions(run: dict[str, Any], origin: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Return max_position_embeddings, the longest sequence of training or of the original model, and notes for the user."""
    trained, stated = longest_sequence(run), origin.get("max_position_embeddings")
    stated = stated if type(stated) is int and stated > 0 else None
    longest = max(trained or 0, stated or 0) or DEFAULT_POSITIONS
    if trained and stated and trained != stated:
        other = f"the longest of a run's sequences is {trained:,}, and the original model has {stated:,}"
        return longest, [f"max_position_embeddings is {longest}: {other}; --max-position-embeddings N sets another"]
    return longest, []
