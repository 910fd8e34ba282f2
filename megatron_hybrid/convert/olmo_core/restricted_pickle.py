"""Unpickler for the pickles of torch.distributed.checkpoint that runs no code of theirs.

A pickle is a program, and loading one normally runs what it names. Here a pickle can name only the stand-ins below: plain
records, tuples and text of this module. Nothing of torch, the standard library or another package is imported, called or
built, so a hostile file can at worst be refused. Its opcodes are first scanned without running them (pickle_scan.py).
"""

import io
import pickle
from typing import Any

from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.olmo_core.pickle_scan import refuse_bombs

_DTYPES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_STORAGES = {
    "FloatStorage": "F32", "BFloat16Storage": "BF16", "HalfStorage": "F16", "DoubleStorage": "F64", "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip


class Record:
    """Stand-in for a class: keeps the state of an object and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update({k: v for k, v in state.items() if isinstance(k, str)})
        else:
            self.state = state


class ChunkStorageMetadata(Record):
    """Stand-in for torch's class: a slice of a tensor."""

    offsets: Any = None
    sizes: Any = None


class TensorStorageMetadata(Record):
    """Stand-in for torch's class: a tensor and its slices."""

    properties: Any = None
    size: Any = None
    chunks: Any = None


class BytesStorageMetadata(Record):
    """Stand-in for torch's class: an entry that is not a tensor."""


class TensorProperties(Record):
    """Stand-in for torch's class: dtype and layout of a tensor."""

    state: Any = ()


class MetadataIndex(Record):
    """Stand-in for torch's class: name and offset of a slice."""

    fqn: Any = None
    offset: Any = None


class StorageInfo(Record):
    """Stand-in for torch's class: the bytes of a file that hold a slice."""

    relative_path: Any = None
    offset: Any = None
    length: Any = None
    transform_descriptors: Any = None


class Metadata(Record):
    """Stand-in for torch's class: the directory of a checkpoint."""

    state_dict_metadata: Any = None
    storage_data: Any = None


class _First:
    """Stand-in for a function or a type: its first argument. It is a class, because a pickle can set a function's defaults."""

    def __new__(cls, value: Any = None, *unused: Any) -> Any:
        return value

    def __setstate__(self, state: Any) -> None: ...


class _Size(_First):
    """Stand-in for torch.Size: the tuple it is built from."""

    def __new__(cls, values: Any = (), *unused: Any) -> Any:
        return values


class _Text(_First):
    """Stand-in for pathlib's paths: their text."""

    def __new__(cls, *parts: Any) -> Any:
        return "/".join(p for p in parts if isinstance(p, str))


class Rebuilt(_First):
    """Stand-in for torch._utils._rebuild_tensor_v2: its arguments."""

    def __new__(
        cls, storage: Any = None, offset: Any = None, size: Any = None, stride: Any = None, *unused: Any
    ) -> Any:
        return ("tensor", storage, offset, size, stride)


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_FILESYSTEM_MODULE = "torch.distributed.checkpoint.filesystem"
METADATA_NAMES: dict[tuple[str, str], Any] = {
    (_METADATA_MODULE, "Metadata"): Metadata,
    (_METADATA_MODULE, "TensorStorageMetadata"): TensorStorageMetadata,
    (_METADATA_MODULE, "BytesStorageMetadata"): BytesStorageMetadata,
    (_METADATA_MODULE, "ChunkStorageMetadata"): ChunkStorageMetadata,
    (_METADATA_MODULE, "TensorProperties"): TensorProperties,
    (_METADATA_MODULE, "MetadataIndex"): MetadataIndex,
    (_METADATA_MODULE, "StorageMeta"): Record,
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"): _First,
    (_FILESYSTEM_MODULE, "_StorageInfo"): StorageInfo,
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _First,
    ("pathlib", "PosixPath"): _Text,
    ("pathlib._local", "PosixPath"): _Text,
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}
ENTRY_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): Rebuilt,
    ("collections", "OrderedDict"): Record,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, names: dict[tuple[str, str], Any], where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._names, self._where = names, where

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise ConversionError(
                f"{self._where}: it names {module}.{name}, which no checkpoint of tensors needs; refused"
            ) from None

    def persistent_load(self, key: Any) -> Any:
        if self._names is not ENTRY_NAMES:
            raise ConversionError(f"{self._where}: persistent objects do not belong there; refused")
        return key


def restricted_load(data: bytes, names: dict[tuple[str, str], Any], where: str) -> Any:
    """Unpickle objects that are built only from `names`.

    Raises:
        ConversionError: the pickle names anything else, or it is damaged.
    """
    try:
        refuse_bombs(data, where)
        return _Unpickler(data, names, where).load()
    except ConversionError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle can fail in any way, and all of them mean the same
        raise ConversionError(f"{where}: damaged ({type(error).__name__}: {str(error)[:200]})") from None
