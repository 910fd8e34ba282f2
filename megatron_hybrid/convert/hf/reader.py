"""A Hugging Face folder as sources of true tensors. Every tensor in it is used, and every true tensor is found.

Exceptions are buffers that transformers computes from config.json (rotary frequencies, causal masks) and ignores in files.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import TensorSpec, model_tensors
from megatron_hybrid.checkpoint.open_files import OpenFiles
from megatron_hybrid.checkpoint.safetensors_header import StoredTensor
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.config import read_config
from megatron_hybrid.convert.hf.names import OUTPUT, Joined, TensorNames
from megatron_hybrid.convert.hf.weight_files import read_weight_files
from megatron_hybrid.convert.io.folder import read_json, regular_file
from megatron_hybrid.convert.io.source import TORCH_NAMES, TensorSource, composed, stacked

CONFIG = "config.json"
_COMPUTED = re.compile(
    r"(.*\.)?(\w*inv_freq|cos_cached|sin_cached|cos_sin_cache|causal_mask|attn_mask|self_attn\.(attn\.)?(masked_)?bias)"
)
"""Names of buffers. No supported architecture has biases: a `bias` of an attention layer is a causal mask."""


@dataclass(frozen=True)
class HuggingFaceFolder:
    """Contents of a folder: the model, config.json as it is, and the place of each true tensor."""

    folder: Path
    config: dict[str, Any]
    model: ModelConfig
    sources: dict[str, TensorSource]
    kept: Mapping[str, StoredTensor]
    """Tensors that are no part of the language model."""
    files: Sequence[Path]
    notes: Sequence[str]
    """Notes for the user."""


def open_huggingface(folder: Path, eos_token_id: int | None = None) -> HuggingFaceFolder:
    """Read and check a folder's configuration and headers. Weights are read only to compare tied copies.

    Raises:
        ConversionError: names the file, field or tensor that is unsafe, damaged, unknown, missing or of a wrong shape.
    """
    if not folder.is_dir():
        raise ConversionError(
            f"{folder}: there is no such folder; give the folder that holds config.json and model.safetensors"
        )
    stored, files = read_weight_files(folder)
    config = read_json(regular_file(folder, CONFIG), limit=1 << 20)
    read = read_config(config, eos_token_id)
    computed = [name for name in stored if _COMPUTED.fullmatch(name) and not read.architecture.keeps(name)]
    kept = {name: tensor for name, tensor in stored.items() if read.architecture.keeps(name)}
    weights = {name: tensor for name, tensor in stored.items() if name not in kept and name not in computed}
    try:
        sources = _Finder(folder, read.model, read.architecture.names(read.model), weights).sources()
    except ConversionError as error:
        if not read.defaults:
            raise
        taken = ", ".join(f"{name} is missing (default: {value!r})" for name, value in read.defaults.items())
        raise ConversionError(f"{error}. In {CONFIG} {taken}") from None
    notes = [*read.notes, *([f"left out, computed from {CONFIG}: {shorten(computed)}"] if computed else [])]
    return HuggingFaceFolder(folder, config, read.model, sources, kept, [*files, folder / CONFIG], notes)


class _Finder:
    """Finds the true tensors of a model among stored tensors."""

    def __init__(
        self, folder: Path, model: ModelConfig, names: TensorNames, stored: Mapping[str, StoredTensor]
    ) -> None:
        self.folder, self.model, self.names = folder, model, names
        self.specs = model_tensors(model)
        self.by_name: dict[str, tuple[str, StoredTensor]] = {}
        """Name in the usual spelling -> (name in the file, tensor)."""
        self.used: set[str] = set()
        for theirs, tensor in stored.items():
            self._add(theirs, tensor)

    def _add(self, theirs: str, tensor: StoredTensor) -> None:
        name = self.names.usual(theirs)
        if name in self.by_name:
            raise ConversionError(
                f"{self.folder}: {theirs} and {self.by_name[name][0]} are two spellings of one tensor; remove one"
            )
        if tensor.dtype not in TORCH_NAMES:
            raise ConversionError(
                f"{self.folder}: {theirs} is {tensor.dtype}; weights must be one of {', '.join(TORCH_NAMES)}"
            )
        self.by_name[name] = (theirs, tensor)

    def sources(self) -> dict[str, TensorSource]:
        """Return the place of each true tensor.

        Raises:
            ConversionError: tensors that are missing, unknown or of a wrong shape, or tied copies that differ.
        """
        specs = self.specs
        tied = self.by_name.pop(OUTPUT["output.weight"], None) if self.model.tie_embeddings else None
        sources: dict[str, TensorSource] = {}
        missing: list[str] = []
        for name, spec in specs.items():
            if (source := self._find(spec, missing)) is not None:
                sources[name] = source
        unknown = sorted(self.by_name[name][0] for name in self.by_name.keys() - self.used)
        problems = [f"tensors are missing: {shorten(missing)}"] if missing else []
        if unknown:
            problems.append(f"tensors that the model in {CONFIG} does not have: {shorten(unknown)}")
        if problems:
            raise ConversionError(f"{self.folder}: {'; '.join(problems)}")
        if tied:
            self._check_tied(sources["embedding.weight"], self._rows("embedding.weight", *tied))
        return sources

    def _find(self, spec: TensorSpec, missing: list[str]) -> TensorSource | None:
        theirs = self.names.theirs(spec.name)
        joined = self.names.joined(spec.name)
        if joined is not None:
            stored = self._spelling(joined)
            if stored:
                self.used.update(stored)
                return self._joined(spec, joined, stored)
            theirs = f"{joined.joined} (or with its {joined.parts})"
        elif theirs in self.by_name:
            self.used.add(theirs)
            return self._rows(spec.name, *self.by_name[theirs])
        missing.append(theirs)
        return None

    def _spelling(self, joined: Joined) -> Sequence[str]:
        """Return the names that are stored: the joined tensor, or all parts. What is left over is reported as unknown."""
        if joined.joined in self.by_name:
            return [joined.joined]
        return joined.parts if all(name in self.by_name for name in joined.parts) else []

    def _joined(self, spec: TensorSpec, joined: Joined, stored: Sequence[str]) -> TensorSource:
        """Return rows of a joined convolution, or of its parts concatenated in the order of rows.

        Parts need not have the widths of the true tensors: transformers' save_pretrained splits into equal parts.
        """
        parts = [self.by_name[name][1] for name in stored]
        inner = self.names.holder(spec.name).shape[1:]
        if (
            any(len(p.shape) != 3 or p.shape[1:] != inner for p in parts)
            or sum(p.shape[0] for p in parts) != joined.rows
        ):
            shapes = ", ".join(
                f"{self.by_name[name][0]} {list(p.shape)}" for name, p in zip(stored, parts, strict=True)
            )
            raise ConversionError(f"{self.folder}: {shapes} should be {[joined.rows, *inner]} together")
        if len({p.dtype for p in parts}) > 1:
            raise ConversionError(f"{self.folder}: {', '.join(stored)} are of different dtypes")
        return stacked(spec.name, parts, spec.shape, joined.first)

    def _rows(self, ours: str, theirs: str, tensor: StoredTensor) -> TensorSource:
        """Return the rows of a stored tensor that make up one of ours."""
        holder, shape = self.names.holder(ours), self.specs[ours].shape
        if tensor.shape != holder.shape:
            raise ConversionError(
                f"{self.folder}: {theirs} is {list(tensor.shape)}, and {list(holder.shape)} by {CONFIG}"
            )
        whole = stacked(theirs, [tensor], tensor.shape)
        return composed(ours, shape, [(whole, rows.at, rows.count) for rows in holder.rows if rows.ours == ours])

    def _check_tied(self, embedding: TensorSource, head: TensorSource) -> None:
        """Check that the output matrix in a tied model's file equals the embedding."""
        from megatron_hybrid.convert.io.compare import Difference, compare_tensors  # imports torch

        with OpenFiles(ConversionError) as files:
            same = compare_tensors(embedding, head, files) == Difference.NONE
        if not same:
            raise ConversionError(
                f"{self.folder}: tie_word_embeddings is true in {CONFIG}, but lm_head.weight differs from "
                "model.embed_tokens.weight; set it to false if the model is not tied, or remove lm_head.weight if it is"
            )


def shorten(names: Iterable[str]) -> str:
    """Return the first five names, and how many more there are."""
    names = list(names)
    return ", ".join(f"{n:.200}" for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
