"""Headers of safetensors files, read strictly: every byte of the file belongs to exactly one tensor.

A header is trusted for nothing: sizes must follow from shapes, ranges must neither overlap nor leave holes nor pass the
end of the file. It is read without mapping the file, so that resident memory does not grow with it.

Format: 8 bytes little-endian length n, n bytes of JSON, then the tensors' bytes.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.folder import MAX_JSON_BYTES, parse_json

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
_MAX_DIMENSIONS = 8
_MAX_NUMBER = 1 << 62


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes [begin, end) of the file, in row-major order."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _whole_numbers(value: object, count: int | None) -> bool:
    return (
        isinstance(value, list)
        and (len(value) <= _MAX_DIMENSIONS if count is None else len(value) == count)
        and all(type(v) is int and 0 <= v < _MAX_NUMBER for v in value)
    )


def _entry(path: Path, name: str, entry: object, data_at: int, size: int) -> StoredTensor:
    where = f"{path}: {name!r:.200}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(f"{where}: its header entry is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ConversionError(f"{where}: dtype {dtype!r:.50} is not one of {', '.join(ITEM_BYTES)}")
    if not _whole_numbers(shape, None) or not _whole_numbers(offsets, 2):
        raise ConversionError(
            f"{where}: shape {shape!r:.100} or data_offsets {offsets!r:.100} are not whole numbers in range"
        )
    begin, end = offsets
    needed = ITEM_BYTES[dtype]
    for length in shape:
        needed *= length
    if end - begin != needed:
        raise ConversionError(
            f"{where}: {dtype} {shape} needs {needed} bytes, its data_offsets {offsets} hold {end - begin}"
        )
    if data_at + end > size:
        raise ConversionError(
            f"{where}: data_offsets {offsets} end behind the file's {size} bytes; it is cut short or damaged"
        )
    return StoredTensor(path, dtype, tuple(shape), data_at + begin, data_at + end)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, in the order they lie in it.

    Raises:
        ConversionError: names the file, and the tensor where one is to blame.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ConversionError(
                f"{path}: a header of {length} bytes does not fit a file of {size}; it is no safetensors file"
            )
        if length > MAX_JSON_BYTES:
            raise ConversionError(
                f"{path}: a header of {length} bytes is refused; real ones are far below {MAX_JSON_BYTES}"
            )
        header = parse_json(file.read(length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ConversionError(f"{path}: its __metadata__ is not text by name")
    data_at = 8 + length
    tensors = {name: _entry(path, name, entry, data_at, size) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = data_at
    for name, tensor in ordered.items():
        if tensor.begin != at:
            what = (
                "overlaps the one before it"
                if tensor.begin < at
                else f"leaves {tensor.begin - at} bytes before it unused"
            )
            raise ConversionError(f"{path}: {name!r:.200} {what}; the file is damaged")
        at = tensor.end
    if at != size:
        raise ConversionError(f"{path}: {size - at} bytes after the last tensor; the file is damaged")
    return ordered
