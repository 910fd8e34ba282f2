"""The safetensors files of a Hugging Face folder: one file, or several with an index."""

from pathlib import Path

from megatron_hybrid.checkpoint.safetensors_header import StoredTensor, read_header
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.io.folder import has_file, read_json, regular_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def read_weight_files(folder: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    """Return every tensor of the folder by name, and the files that were read.

    Raises:
        ConversionError: no safetensors files, two kinds of them, or an index that contradicts the files.
    """
    if has_file(folder, INDEX) and has_file(folder, SINGLE):
        raise ConversionError(f"{folder}: both {INDEX} and {SINGLE} are there; remove the one that is not the model")
    if has_file(folder, SINGLE):
        path = regular_file(folder, SINGLE)
        return read_header(path, ConversionError), [path]
    if not has_file(folder, INDEX):
        raise ConversionError(_without_weights(folder))
    return _read_indexed(folder)


def _read_indexed(folder: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    index = regular_file(folder, INDEX)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{index}: its weight_map is not a file name by tensor name")
    tensors: dict[str, StoredTensor] = {}
    paths = [regular_file(folder, name) for name in dict.fromkeys(weight_map.values())]
    for path in paths:
        if path.suffix != ".safetensors":
            raise ConversionError(f"{index}: {path.name} is not a safetensors file; nothing else is read")
        header = read_header(path, ConversionError)
        for name in header:
            if weight_map.get(name) != path.name:
                raise ConversionError(
                    f"{path}: it holds {name!r:.200}, which {INDEX} puts into {weight_map.get(name)!r:.100}"
                )
        tensors |= header
    for name, file in weight_map.items():
        if name not in tensors:
            raise ConversionError(f"{folder / file}: it has no tensor {name!r:.200}, though {INDEX} says so")
    return tensors, [index, *paths]


def _without_weights(folder: Path) -> str:
    """Return the error for a folder without safetensors files."""
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: {pickles[0]} is a pickle, which can run any code when it is loaded; only safetensors are read. If you "
            "trust it: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('DIR', "
            "dtype='auto').save_pretrained('NEW_DIR')\", then convert NEW_DIR"
        )
    return f"{folder}: neither {SINGLE} nor {INDEX} is there{_hint(folder)}"


def _hint(folder: Path) -> str:
    """Return what to give instead of a folder without weights."""
    if has_file(folder, "adapter_config.json"):
        return (
            "; it is a PEFT adapter: merge it into its model (`merge_and_unload`, `save_pretrained`), and convert that"
        )
    snapshots = [path for path in sorted((folder / "snapshots").glob("*")) if path.is_dir()]
    return f"; give a snapshot of this Hugging Face cache: {snapshots[-1]}" if snapshots else ""
