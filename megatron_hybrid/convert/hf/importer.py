"""Import of a Hugging Face folder into a checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from megatron_hybrid.arch.tensors import TensorSpec, model_tensors
from megatron_hybrid.checkpoint.origin import Origin
from megatron_hybrid.convert.checkpoint_output import CONVERTED_STATE, MAX_FILE_BYTES, stored_dtype, write_index
from megatron_hybrid.convert.hf.kept_tensors import KEPT_TENSORS, tensors_file
from megatron_hybrid.convert.hf.original_files import left_out, original_files
from megatron_hybrid.convert.hf.reader import HuggingFaceFolder, open_huggingface
from megatron_hybrid.convert.io.source import TensorSource
from megatron_hybrid.convert.io.writer import OutputTensor
from megatron_hybrid.convert.job import Conversion, Facts, split_into_files


def _outputs(
    sources: dict[str, TensorSource], specs: dict[str, TensorSpec], dtype: str | None
) -> Iterator[OutputTensor]:
    for name, spec in specs.items():
        source = sources[name]
        yield OutputTensor(name, stored_dtype(spec, source.dtype, dtype), spec.shape, lambda found=source: found)  # type: ignore[misc]


def from_huggingface(
    folder: Path,
    target: Path,
    dtype: str | None = None,
    eos_token_id: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Conversion:
    """Plan the conversion of a Hugging Face folder to a checkpoint. Nothing is written yet.

    Args:
        dtype: type of the weights by its name in safetensors (F32, BF16); None: as they are. A_log and dt_bias become F32,
            which changes no value.

    Raises:
        ConversionError: as `open_huggingface`.
    """
    source = open_huggingface(folder, eos_token_id)
    outputs = list(_outputs(source.sources, model_tensors(source.model), dtype))
    files = split_into_files(outputs, max_file_bytes)
    origin = {"format": "huggingface", "config": source.config, "bf16": [] if dtype else _widened(source)}
    originals = original_files(folder)

    def finish(written: Path, facts: Facts) -> None:
        kept = {KEPT_TENSORS: tensors_file(source.kept)} if source.kept else {}
        Origin(files={name: path.read_bytes() for name, path in originals.items()} | kept).write(written)
        write_index(written, facts, files, source.model, {"converted_from": origin}, CONVERTED_STATE)

    notes = [*source.notes, *_notes(folder, source, originals)]
    read = [*source.files, *originals.values()]
    return Conversion(target, files, read, with_hash=True, finish=finish, notes=notes)


def _widened(source: HuggingFaceFolder) -> list[str]:
    """Return the tensors that are BF16 in the folder and that a checkpoint keeps in F32. An export has their type again."""
    specs = model_tensors(source.model)
    return [name for name, tensor in source.sources.items() if specs[name].always_fp32 and tensor.dtype == "BF16"]


def _notes(folder: Path, source: HuggingFaceFolder, originals: dict[str, Path]) -> Iterator[str]:
    """Yield what the conversion changes or leaves out."""
    if source.kept:
        yield f"kept for exports, and not trained: {len(source.kept)} tensors such as {next(iter(source.kept))}"
    if any(tensor.dtype == "F64" for tensor in source.sources.values()):
        yield "weights stored in fp64 are kept in fp32"
    if source.config.get("auto_map"):
        yield "left out of config.json: auto_map, and the code it names"
    if unused := left_out(folder, {path.name for path in source.files} | originals.keys()):
        yield f"left out of {folder}: {', '.join(unused[:10])}{f' and {len(unused) - 10} more' if len(unused) > 10 else ''}"
