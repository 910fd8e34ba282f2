"""Hugging Face `olmo_hybrid` and `olmo3` to a checkpoint of ours."""

from collections.abc import Iterator
from pathlib import Path

from megatron_hybrid.arch.tensors import TensorSpec, model_tensors
from megatron_hybrid.checkpoint.origin import Origin
from megatron_hybrid.convert.hf_reader import HuggingFaceFolder, open_huggingface
from megatron_hybrid.convert.job import Conversion, Facts, split_into_files
from megatron_hybrid.convert.original_files import left_out, original_files
from megatron_hybrid.convert.our_files import CONVERTED_STATE, write_index
from megatron_hybrid.convert.safetensors_writer import OutputTensor
from megatron_hybrid.convert.source import TensorSource

MAX_FILE_BYTES = 2_000_000_000
"""Files of this size: enough of them for several ranks to share."""


def our_dtype(spec: TensorSpec, stored: str, wanted: str | None) -> str:
    """What a weight is kept as: as wanted, else as stored; what must be fp32, or was fp64, is fp32."""
    return "F32" if spec.always_fp32 else wanted or ("F32" if stored == "F64" else stored)


def outputs(sources: dict[str, TensorSource], specs: dict[str, TensorSpec], wanted: str | None) -> list[OutputTensor]:
    """Every true tensor from its source."""
    return [
        OutputTensor(
            name, our_dtype(spec, sources[name].dtype, wanted), spec.shape, lambda source=sources[name]: source
        )  # type: ignore[misc]
        for name, spec in specs.items()
    ]


def from_huggingface(
    folder: Path,
    target: Path,
    dtype: str | None = None,
    eos_token_id: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Conversion:
    """Plan the conversion of a Hugging Face folder to a checkpoint of ours; nothing is written yet.

    Args:
        dtype: safetensors' name of the type to keep weights in (F32, BF16); None: as they are. A_log and dt_bias become F32,
            which changes no value.

    Raises:
        ConversionError: as `open_huggingface`.
    """
    source = open_huggingface(folder, eos_token_id)
    files = split_into_files(outputs(source.sources, model_tensors(source.model), dtype), max_file_bytes)
    origin = {"format": "huggingface", "config": source.config}
    originals = original_files(folder)

    def finish(written: Path, facts: Facts) -> None:
        Origin(files={name: path.read_bytes() for name, path in originals.items()}).write(written)
        write_index(written, facts, files, source.model, origin, CONVERTED_STATE)

    notes = [*source.notes, *_notes(folder, source, originals)]
    read = [*source.files, *originals.values()]
    return Conversion(target, files, read, with_hash=True, finish=finish, notes=notes)


def _notes(folder: Path, source: HuggingFaceFolder, originals: dict[str, Path]) -> Iterator[str]:
    """What the conversion changes or leaves out."""
    if any(tensor.dtype == "F64" for tensor in source.sources.values()):
        yield "weights stored in fp64 are kept in fp32"
    if source.config.get("auto_map"):
        yield "left out of config.json: auto_map, and the code it names"
    if unused := left_out(folder, {path.name for path in source.files} | originals.keys()):
        yield f"left out of {folder}: {', '.join(unused[:10])}{f' and {len(unused) - 10} more' if len(unused) > 10 else ''}"
