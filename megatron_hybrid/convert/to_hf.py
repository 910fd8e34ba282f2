"""A checkpoint of ours to a Hugging Face folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_hybrid.config.tensors import TensorSpec, model_tensors
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.folder import has_file, regular_file
from megatron_hybrid.convert.hf_card import model_card
from megatron_hybrid.convert.hf_export import DEFAULT_POSITIONS, hf_from_model
from megatron_hybrid.convert.job import Conversion, Facts, split_into_files, write_text
from megatron_hybrid.convert.names import huggingface_name
from megatron_hybrid.convert.our_files import OurCheckpoint
from megatron_hybrid.convert.safetensors_writer import OutputTensor
from megatron_hybrid.convert.source import TORCH_NAMES, TensorSource
from megatron_hybrid.data.agreement import checkpoint_disagreements, refuse

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
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
        tokenizer: a folder whose tokenizer files are copied.
        positions: max_position_embeddings; None: the run's sequence length, or what it was converted from, or 65536.

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
    config = hf_from_model(
        model, weights_dtype, positions or _positions(source.index.run, origin), origin.get("bos_token_id")
    )
    files = split_into_files(tensors, max_shard_bytes)
    if len(files) == 1:
        files = {"model.safetensors": next(iter(files.values()))}
    copied = _tokenizer_files(tokenizer) if tokenizer else []
    warnings = refuse(checkpoint_disagreements(model, source.index.run, str(tokenizer) if tokenizer else None))

    def finish(written: Path, _: Facts) -> None:
        if len(files) > 1:
            weight_map = {t.name: file for file, group in files.items() for t in group}
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in tensors)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_text(written / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        write_text(written / "config.json", json.dumps(config, indent=2) + "\n")
        generation = {
            name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if config[name] is not None
        }
        write_text(written / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        write_text(written / "README.md", model_card(model, config, source.index, bool(copied)))
        for path in copied:
            shutil.copyfile(path, written / path.name)

    return Conversion(target, files, [*source.files, *copied], with_hash=False, finish=finish, warnings=warnings)


def _output(source: TensorSource, spec: TensorSpec, name: str, dtype: str | None, all_dtype: bool) -> OutputTensor:
    shape = (spec.shape[0], 1, spec.shape[1]) if spec.kind == "conv" else spec.shape
    keep = spec.always_fp32 and not all_dtype
    shaped = TensorSource(source.name, source.dtype, shape, source.boxes)
    return OutputTensor(name, "F32" if keep else dtype or source.dtype, shape, lambda: shaped)


def _origin(run: dict[str, Any]) -> dict[str, Any]:
    """The config.json that the checkpoint was once converted from; empty where it was not."""
    origin = run.get("converted_from") if isinstance(run, dict) else None
    config = origin.get("config") if isinstance(origin, dict) and origin.get("format") == "huggingface" else None
    return config if isinstance(config, dict) else {}


def _positions(run: dict[str, Any], origin: dict[str, Any]) -> int:
    data = run.get("data") if isinstance(run, dict) else None
    for value in (
        data.get("sequence_length") if isinstance(data, dict) else None,
        origin.get("max_position_embeddings"),
    ):
        if type(value) is int and value > 0:
            return value
    return DEFAULT_POSITIONS


def _tokenizer_files(folder: Path) -> list[Path]:
    found = [regular_file(folder, name) for name in TOKENIZER_FILES if has_file(folder, name)]
    if not any(path.name in ("tokenizer.json", "vocab.json", "tokenizer.model") for path in found):
        raise ConversionError(f"{folder}: no tokenizer is there; it should hold {', '.join(TOKENIZER_FILES[:3])}")
    return found
