"""Headers of safetensors files.

The safetensors library checks a header: sizes follow from dtypes and shapes, and the tensors cover the file without overlap
or gap. `read_header` adds what it lets pass (as of 0.8.0): keys that occur twice, and unknown fields. The library maps the
file but reads only its header, so that resident memory does not grow with the file.

Format: 8 bytes little-endian length n, n bytes of JSON, then the tensors' bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.base.json_text import parse_json_object

MAX_HEADER_BYTES = 8 << 20
"""The header of a file with 50,000 tensors. The library allows 100 MB, of which it would make 1 GB of objects."""
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "I16": "int16",
    "U16": "uint16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "F64": "float64",
    "I64": "int64", "U64": "uint64",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Bytes [begin, end) of a file that hold a tensor, row-major."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, error: type[UserError]) -> dict[str, StoredTensor]:
    """Return every tensor of a safetensors file by name, in file order.

    Raises:
        error: the file is damaged. Names the file, and the tensor where one is at fault.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise error(
                f"{path}: a header of {length} bytes is refused; real headers are far below {MAX_HEADER_BYTES}; the file is "
                "damaged, or no safetensors file"
            )
        _check_by_library(path, error)
        header = parse_json_object(file.read(length), f"{path}: header", error)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length, error) for name, entry in header.items()}
    return dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))


def _check_by_library(path: Path, error: type[UserError]) -> None:
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as failure:
        raise error(f"{path}: not a safetensors file, or a damaged one ({failure!s:.300})") from None


def _tensor(path: Path, name: str, entry: dict[str, Any], data_at: int, error: type[UserError]) -> StoredTensor:
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise error(f"{path}: {name!r:.200}: its header entry is not dtype, shape and data_offsets")
    if entry["dtype"] not in ITEM_BYTES:
        raise error(f"{path}: {name!r:.200}: dtype {entry['dtype']!r:.50} is not one of {', '.join(ITEM_BYTES)}")
    begin, end = entry["data_offsets"]
    return StoredTensor(path, entry["dtype"], tuple(entry["shape"]), data_at + begin, data_at + end)
