"""A checkpoint of ours to a Hugging Face folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import TensorSpec, model_tensors
from megatron_hybrid.checkpoint.origin import longest_sequence
from megatron_hybrid.convert.hf_card import model_card
from megatron_hybrid.convert.hf_export import DEFAULT_POSITIONS, hf_from_model
from megatron_hybrid.convert.job import Conversion, Facts, split_into_files, write_text
from megatron_hybrid.convert.names import huggingface_name
from megatron_hybrid.convert.original_files import GENERATION_CONFIG, generation_config, given_tokenizer, kept_files
from megatron_hybrid.convert.our_files import OurCheckpoint
from megatron_hybrid.convert.safetensors_writer import OutputTensor
from megatron_hybrid.convert.source import TORCH_NAMES, TensorSource
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
    """Plan the conversion of a checkpoint of ours to a Hugging Face folder; nothing is written yet.

    Args:
        dtype: safetensors' name of the type of the weights (F32, BF16); None: as they are. F32 takes the optimizer's fp32
            masters where the checkpoint has them: a bf16 run's weights are rounded copies.
        all_dtype: A_log and dt_bias in `dtype` too; else they keep fp32.
        tokenizer: a folder whose tokenizer files are copied; None: those of the model it was converted from, if any.
        positions: max_position_embeddings; None: the longest of the runs' sequence lengths and the original model's.

    Raises:
        ConversionError: a damaged checkpoint, a model that transformers cannot compute, no tokenizer in the folder.
        DataError: a tokenizer with more ids than the model has, or another than the model was trained with.
    """
    source = OurCheckpoint(checkpoint)
    model = source.model
    stored = source.precise_source if dtype == "F32" else source.source
    tensors = [
        _output(stored(name), spec, huggingface_name(model, name), dtype, all_dtype)
        for name, spec in model_tensors(model).items()
    ]
    origin = _origin(source.index.run)
    weights_dtype = TORCH_NAMES[max(tensors, key=lambda t: t.nbytes).dtype]
    chosen, notes = (positions, []) if positions else _positions(source.index.run, origin)
    config = hf_from_model(model, weights_dtype, chosen, origin)
    files = split_into_files(tensors, max_shard_bytes)
    if len(files) == 1:
        files = {"model.safetensors": next(iter(files.values()))}
    kept = kept_files(checkpoint)
    generation, more_notes = generation_config(config, kept.pop(GENERATION_CONFIG, None))
    copied = given_tokenizer(tokenizer) if tokenizer else kept
    disagreements = checkpoint_disagreements(model, source.index.run, str(tokenizer) if tokenizer else None)
    notes += [*more_notes, *_version_notes(model), *refuse(disagreements)]

    def finish(written: Path, _: Facts) -> None:
        if len(files) > 1:
            weight_map = {t.name: file for file, group in files.items() for t in group}
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in tensors)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_text(written / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        write_text(written / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(written / GENERATION_CONFIG, json.dumps(generation, indent=2) + "\n")
        write_text(written / "README.md", model_card(model, config, source.index, bool(copied)))
        for name, path in copied.items():
            (written / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, written / name)

    return Conversion(target, files, [*source.files, *copied.values()], with_hash=False, finish=finish, notes=notes)


def _output(source: TensorSource, spec: TensorSpec, name: str, dtype: str | None, all_dtype: bool) -> OutputTensor:
    shape = (spec.shape[0], 1, spec.shape[1]) if spec.decay_group == "convolution" else spec.shape
    keep = spec.always_fp32 and not all_dtype
    shaped = TensorSource(source.name, source.dtype, shape, source.boxes)
    return OutputTensor(name, "F32" if keep else dtype or source.dtype, shape, lambda: shaped)


def _origin(run: dict[str, Any]) -> dict[str, Any]:
    """The config.json that the checkpoint was once converted from; empty where it was not."""
    origin = run.get("converted_from") if isinstance(run, dict) else None
    config = origin.get("config") if isinstance(origin, dict) and origin.get("format") == "huggingface" else None
    return config if isinstance(config, dict) else {}


def _positions(run: dict[str, Any], origin: dict[str, Any]) -> tuple[int, list[str]]:
    """max_position_embeddings, and remarks for the user: the longest that the weights have seen or were said to take."""
    trained, stated = longest_sequence(run), origin.get("max_position_embeddings")
    stated = stated if type(stated) is int and stated > 0 else None
    longest = max(trained or 0, stated or 0) or DEFAULT_POSITIONS
    if trained and stated and trained != stated:
        other = f"the longest of a run's sequences is {trained:,}, and the original model has {stated:,}"
        return longest, [f"max_position_embeddings is {longest}: {other}; --max-position-embeddings N sets another"]
    return longest, []


def _version_notes(model: ModelConfig) -> list[str]:
    """Which versions of transformers compute something else, whatever config.json says."""
    if model.rope_scaling is None or not {"A", "W"} <= set(model.layers):
        return []
    return ["transformers 5.0 to 5.12 apply rope_scaling to sliding attention as well; use 4.57, or 5.13 and later"]
