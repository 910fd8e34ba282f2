"""A Hugging Face folder as sources of our true tensors: every tensor of it is used, every one of ours is found.

Exempt are tensors that transformers computes from config.json (rotary frequencies, causal masks) and ignores in files.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import TensorSpec, model_tensors
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.folder import has_file, read_json, regular_file
from megatron_hybrid.convert.hf_config import read_config
from megatron_hybrid.convert.names import huggingface_name, usual_name
from megatron_hybrid.convert.safetensors_header import StoredTensor, read_header
from megatron_hybrid.convert.source import TORCH_NAMES, OpenFiles, TensorSource, stacked

_INDEX, _SINGLE, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_COMPUTED = re.compile(
    r"(.*\.)?(\w*inv_freq|cos_cached|sin_cached|cos_sin_cache|causal_mask|attn_mask|self_attn\.(attn\.)?(masked_)?bias)"
)
"""Buffers by name. None of our models has a bias: what an attention layer calls so is a causal mask."""


@dataclass(frozen=True)
class HuggingFaceFolder:
    """What a folder holds: the model, config.json as it is, and where each of our true tensors lies."""

    folder: Path
    config: dict[str, Any]
    model: ModelConfig
    sources: dict[str, TensorSource]
    files: Sequence[Path]
    notes: Sequence[str]
    """Remarks for the user."""


def open_huggingface(folder: Path, eos_token_id: int | None = None) -> HuggingFaceFolder:
    """Read a folder's configuration and headers, and check all of it; no weights are read (but to compare tied copies).

    Raises:
        ConversionError: names the file, field or tensor that is unsafe, damaged, unknown, missing or of a wrong shape.
    """
    if not folder.is_dir():
        raise ConversionError(
            f"{folder}: there is no such folder; give the folder that holds config.json and model.safetensors"
        )
    stored, files = _weights(folder)
    config = read_json(regular_file(folder, _CONFIG), limit=1 << 20)
    read = read_config(config, eos_token_id)
    computed = [name for name in stored if _COMPUTED.fullmatch(name)]
    weights = {name: tensor for name, tensor in stored.items() if name not in computed}
    try:
        sources = _sources(folder, read.model, weights)
    except ConversionError as error:
        if not read.defaults:
            raise
        taken = ", ".join(f"{name} is missing (default: {value!r})" for name, value in read.defaults.items())
        raise ConversionError(f"{error}. In {_CONFIG} {taken}") from None
    notes = [*read.notes, *([f"left out, computed from {_CONFIG}: {_some(computed)}"] if computed else [])]
    return HuggingFaceFolder(folder, config, read.model, sources, [*files, folder / _CONFIG], notes)


def _weights(folder: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    """Every tensor of the folder's safetensors, and the files read."""
    if has_file(folder, _INDEX) and has_file(folder, _SINGLE):
        raise ConversionError(f"{folder}: both {_INDEX} and {_SINGLE} are there; remove the one that is not the model")
    if has_file(folder, _SINGLE):
        path = regular_file(folder, _SINGLE)
        return read_header(path), [path]
    if not has_file(folder, _INDEX):
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        if pickles:
            raise ConversionError(
                f"{folder}: {pickles[0]} is a pickle, which can run any code when it is loaded; only safetensors are read. Where you "
                "trust it: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('DIR', "
                "dtype='auto').save_pretrained('NEW_DIR')\", then convert NEW_DIR"
            )
        raise ConversionError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there{_hint(folder)}")
    index = regular_file(folder, _INDEX)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{index}: its weight_map is not a file name by tensor name")
    tensors: dict[str, StoredTensor] = {}
    paths = [regular_file(folder, name) for name in dict.fromkeys(weight_map.values())]
    for path in paths:
        if path.suffix != ".safetensors":
            raise ConversionError(f"{index}: {path.name} is not a safetensors file; nothing else is read")
        header = read_header(path)
        for name in header:
            if weight_map.get(name) != path.name:
                raise ConversionError(
                    f"{path}: it holds {name!r:.200}, which {_INDEX} puts into {weight_map.get(name)!r:.100}"
                )
        tensors |= header
    for name, file in weight_map.items():
        if name not in tensors:
            raise ConversionError(f"{folder / file}: it has no tensor {name!r:.200}, though {_INDEX} says so")
    return tensors, [index, *paths]


def _hint(folder: Path) -> str:
    """What to give instead of a folder without weights."""
    if has_file(folder, "adapter_config.json"):
        return (
            "; it is a PEFT adapter: merge it into its model (`merge_and_unload`, `save_pretrained`), and convert that"
        )
    snapshots = [path for path in sorted((folder / "snapshots").glob("*")) if path.is_dir()]
    return f"; give a snapshot of this Hugging Face cache: {snapshots[-1]}" if snapshots else ""


def _sources(folder: Path, model: ModelConfig, stored: dict[str, StoredTensor]) -> dict[str, TensorSource]:
    """Where each true tensor lies among the stored ones."""
    by_name: dict[str, tuple[str, StoredTensor]] = {}
    for theirs, tensor in stored.items():
        name = usual_name(model, theirs)
        if name in by_name:
            raise ConversionError(
                f"{folder}: {theirs} and {by_name[name][0]} are two spellings of one tensor; one too many"
            )
        if tensor.dtype not in TORCH_NAMES:
            raise ConversionError(
                f"{folder}: {theirs} is {tensor.dtype}; only {', '.join(TORCH_NAMES)} are weights of such a model"
            )
        by_name[name] = (theirs, tensor)
    tied = by_name.pop("lm_head.weight", None) if model.tie_embeddings else None
    sources, used, missing = {}, set(), []
    for name, spec in model_tensors(model).items():
        theirs, convolutions = huggingface_name(model, name), _convolutions(model, name)
        if convolutions:
            parts, first, total = convolutions
            names = _spelling(parts, by_name)
            if names:
                used.update(names)
                sources[name] = _joined(folder, spec, names, by_name, first, total)
                continue
            theirs = f"{parts[0]} (or with its {parts[1:]})"
        elif theirs in by_name:
            used.add(theirs)
            sources[name] = _whole(folder, spec, *by_name[theirs])
            continue
        missing.append(theirs)
    unknown = [by_name[name][0] for name in by_name.keys() - used]
    problems = [f"tensors are missing: {_some(missing)}"] if missing else []
    if unknown:
        problems.append(f"tensors that the model in {_CONFIG} does not have: {_some(sorted(unknown))}")
    if problems:
        raise ConversionError(f"{folder}: {'; '.join(problems)}")
    if tied:
        _check_tied(
            folder, sources["embedding.weight"], _whole(folder, model_tensors(model)["embedding.weight"], *tied)
        )
    return sources


def _convolutions(model: ModelConfig, name: str) -> tuple[tuple[str, ...], int, int] | None:
    """Of a convolution: (the joined name, the three separate ones), its first row in the joined one, all rows of that."""
    theirs = huggingface_name(model, name)
    for letter in "qkv":
        prefix, found, _ = theirs.partition(f".linear_attn.{letter}_conv1d.weight")
        if found and model.gdn:
            key, value = model.gdn.key_dim, model.gdn.value_dim
            prefix += ".linear_attn"
            names = (f"{prefix}.conv1d.weight", *(f"{prefix}.{part}_conv1d.weight" for part in "qkv"))
            return names, {"q": 0, "k": key, "v": 2 * key}[letter], 2 * key + value
    return None


def _spelling(names: Sequence[str], by_name: dict[str, Any]) -> Sequence[str] | None:
    """Which of the two spellings is there: [joined], the three in order, or None. Leftovers are told as unknown."""
    if names[0] in by_name:
        return [names[0]]
    return names[1:] if all(name in by_name for name in names[1:]) else None


def _joined(folder: Path, spec: TensorSpec, names: Sequence[str], by_name, first: int, total: int) -> TensorSource:
    """Rows of a joined convolution, or of three laid together in the order q, k, v.

    Three need not have q's, k's and v's own widths: transformers' save_pretrained splits into equal thirds.
    """
    parts = [by_name[name][1] for name in names]
    taps = spec.shape[1]
    if any(len(p.shape) != 3 or p.shape[1:] != (1, taps) for p in parts) or sum(p.shape[0] for p in parts) != total:
        shapes = ", ".join(f"{by_name[n][0]} {list(p.shape)}" for n, p in zip(names, parts, strict=True))
        raise ConversionError(f"{folder}: {shapes} should be [{total}, 1, {taps}] together")
    if len({p.dtype for p in parts}) > 1:
        raise ConversionError(f"{folder}: {', '.join(names)} are of different dtypes")
    return stacked(spec.name, parts, spec.shape, first)


def _whole(folder: Path, spec: TensorSpec, theirs: str, tensor: StoredTensor) -> TensorSource:
    if tensor.shape != spec.shape:
        raise ConversionError(f"{folder}: {theirs} is {list(tensor.shape)}, and {list(spec.shape)} by {_CONFIG}")
    return stacked(spec.name, [tensor], spec.shape)


def _check_tied(folder: Path, embedding: TensorSource, head: TensorSource) -> None:
    """A tied model's file may hold the output matrix as well, if it is the same."""
    from megatron_hybrid.convert.compare import Difference, compare_tensors  # it imports torch

    with OpenFiles() as files:
        same = compare_tensors(embedding, head, files) == Difference.NONE
    if not same:
        raise ConversionError(
            f"{folder}: tie_word_embeddings is true in {_CONFIG}, but lm_head.weight differs from model.embed_tokens.weight; "
            "set it to false if the model is not tied, or remove lm_head.weight if it is"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(f"{n:.200}" for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
