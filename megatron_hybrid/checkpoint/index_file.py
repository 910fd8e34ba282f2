"""The index of a checkpoint as a file: parsed, and checked against the other files.

A file may come from anywhere: its size, the number of its values and their types are bounded before they are used.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.base.json_text import parse_json_object
from megatron_hybrid.base.lfs import refuse_lfs_pointer
from megatron_hybrid.checkpoint.format import FORMAT, INDEX, CheckpointError, Index, StoredSlice, TensorEntry
from megatron_hybrid.config.renames import rename_saved

MAX_INDEX_BYTES = 32 << 20
"""A run on 1,024 ranks writes about 2 MB."""
_MAX_SLICES = 80_000
"""Of all tensors. A run on 1,024 ranks writes about 15,000."""
_WITHOUT_CHECKSUM = "megatron_hybrid/1"
"""Format of earlier versions: the same, but the index has no checksum, and other files than safetensors have none."""
_MEMBERS = {"format", "model", "run", "state", "files", "other_files", "tensors"}
_CHECKSUM = re.compile(rb',"sha256":"([0-9a-f]{64})"}\Z')
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_OTHER_NAME = re.compile(r"(?:[^/\0]{1,255}/){0,8}[^/\0]{1,255}")


def read_index(folder: Path) -> Index:
    """Read the index of a complete checkpoint. Check that it is as it was written, that the slices of every tensor cover it
    exactly, and that all files have the sizes that it states. Their content is checked in checkpoint/verification.py.

    Raises:
        CheckpointError: no index, a damaged one, another format, or a file that is missing or has another size.
        OSError: a file cannot be read. That says nothing about its content.
    """
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no {INDEX}; name a folder such as RUN/checkpoints/step-00001000"
        )
    refuse_lfs_pointer(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_INDEX_BYTES + 1)
        index = parse_index(data, path)
        sizes = {name: facts["bytes"] for name, facts in index.all_files().items()}
    except (CheckpointError, OSError):
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: damaged ({type(error).__name__}: {error!s:.200}); use an earlier checkpoint"
        ) from error
    for name, size in sizes.items():
        _check_file(path, name, size, name in index.files)
    for name, entry in index.tensors.items():
        if absent := next((stored.file for stored in entry.slices if stored.file not in index.files), None):
            raise CheckpointError(f"{path}: {name} is in {absent}, which it does not list; use an earlier checkpoint")
    for problem in index.coverage_problems():
        raise CheckpointError(f"{folder}: {problem}; use an earlier checkpoint")
    return index


def parse_index(data: bytes, path: Path) -> Index:
    """Parse and check the text of an index.

    Raises:
        CheckpointError: damaged, or another format.
        ValueError, LookupError, TypeError, AttributeError: values of another type or form.
    """
    if len(data) > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_INDEX_BYTES >> 20} MiB; no checkpoint has such an index")
    text, checksum = _split_checksum(data, path)
    content = parse_json_object(text, f"{path}: damaged", CheckpointError)
    if (found := content.get("format")) != (FORMAT if checksum else _WITHOUT_CHECKSUM):
        missing = "; it should end with its checksum, so it is damaged" if found == FORMAT else ""
        raise CheckpointError(f"{path}: format {found!r:.50}; this version reads {FORMAT!r}{missing}")
    if unknown := content.keys() - _MEMBERS:
        raise CheckpointError(
            f"{path}: damaged: it has an unknown member {min(unknown)!r:.50}; use an earlier checkpoint"
        )
    parts = [content[name] for name in ("model", "run", "state", "files")]
    others = content.get("other_files", {})
    if not all(isinstance(part, dict) for part in (*parts, others)):
        raise TypeError("model, run, state and files must be objects")
    model, run, state, files = parts
    tensors = tensors_from_json(content["tensors"])
    return Index(model, rename_saved(run), state, files, tensors, others, checksum)


def _split_checksum(data: bytes, path: Path) -> tuple[bytes, str | None]:
    """Return the text of an index without its checksum, and the checksum; None if it has none.

    Raises:
        CheckpointError: the checksum is not that of the text.
    """
    if not (match := _CHECKSUM.search(data, max(0, len(data) - 100))):
        return data, None
    text, checksum = data[: match.start()] + b"}", match[1].decode()
    if hashlib.sha256(text).hexdigest() != checksum:
        raise CheckpointError(
            f"{path}: damaged: its SHA-256 is not the one that was written with it; use an earlier checkpoint"
        )
    return text, checksum


def _check_file(index: Path, name: str, size: int, is_tensor_file: bool) -> None:
    pattern = _FILE_NAME if is_tensor_file else _OTHER_NAME
    if not pattern.fullmatch(name) or ".." in name.split("/"):
        what = "safetensors file" if is_tensor_file else "file"
        raise CheckpointError(f"{index}: {name!r:.200} is not the name of a {what} in the checkpoint's folder")
    file = index.parent / name
    if file.is_file() and file.stat().st_size == size:
        return
    if file.is_file():
        refuse_lfs_pointer(file)
    found = f"{file.stat().st_size} bytes" if file.is_file() else "no file"
    raise CheckpointError(f"{file}: {found}, {size!r:.50} bytes were written; use an earlier checkpoint")


def _whole_numbers(values: list[int]) -> tuple[int, ...]:
    if not set(map(type, values)) <= {int}:
        raise TypeError(f"{values!r:.100} are not whole numbers")
    return tuple(values)


def _slice_from_json(data: dict[str, Any]) -> StoredSlice:
    part = TensorSlice(_whole_numbers(data["offset"]), _whole_numbers(data["shape"]))
    if not data["range"]:
        return StoredSlice(data["file"], data["entry"], part)
    start, stop = _whole_numbers(data["range"])
    return StoredSlice(data["file"], data["entry"], part, (start, stop))


def _check_file_name(tensor: str, file: str) -> None:
    if not _FILE_NAME.fullmatch(file):
        raise CheckpointError(f"{tensor}: {file!r} is not the name of a safetensors file in the checkpoint's folder")


def _fits(at: int, length: int, total: int) -> bool:
    return at >= 0 < length and at + length <= total


def _check_slice(name: str, shape: tuple[int, ...], stored: StoredSlice) -> None:
    part = stored.slice
    inside = len(part.offset) == len(part.shape) == len(shape) and all(map(_fits, part.offset, part.shape, shape))
    if inside and stored.range is not None:
        inside = len(shape) in (1, 2) and 0 <= stored.range[0] < stored.range[1] <= part.numel
    if not inside:
        raise CheckpointError(f"{name}: a shard at {part.offset} of shape {part.shape} is outside the tensor's {shape}")


def tensors_from_json(data: dict[str, Any]) -> dict[str, TensorEntry]:
    """Parse and check the `tensors` of an index, or of one rank's part of it.

    Raises:
        CheckpointError: a file outside the folder, a slice outside its tensor, a range outside its slice, too many slices.
        TypeError, KeyError, ValueError: values of another type or form.
    """
    if (count := sum(len(entry["shards"]) for entry in data.values())) > _MAX_SLICES:
        raise CheckpointError(
            f"{INDEX}: {count:,} slices of tensors, of {_MAX_SLICES:,} at most; save it from fewer ranks"
        )
    tensors, files = {}, set[str]()
    for name, entry in data.items():
        shape = _whole_numbers(entry["shape"])
        slices = [_slice_from_json(stored) for stored in entry["shards"]]
        if not all(isinstance(text, str) for text in (entry["dtype"], *(stored.entry for stored in slices))):
            raise TypeError(f"{name}: dtype and entry must be text")
        for stored in slices:
            if stored.file not in files:
                _check_file_name(name, stored.file)
                files.add(stored.file)
            _check_slice(name, shape, stored)
        tensors[name] = TensorEntry(entry["dtype"], shape, slices)
    return tensors
