"""Raw token shards (`.npy`): the type of their tokens, and checks of the type against the content.

OLMo-core writes its shards with `tofile`: plain uint16 or uint32 without NumPy's header, so that nothing in the file states
the type. Tokens read with the wrong width are garbage that may still lie inside the vocabulary.

- `raw_dtype`: type, offset and number of a shard's tokens.
- `contradiction`: reason why tokens cannot have the type that they were read as.
- `fitting_types`: types as which the same bytes are tokens of the vocabulary.
"""

import os
import string
from typing import Any, NamedTuple

import numpy as np

from megatron_hybrid.base.lfs import LFS_REMEDY, is_lfs_pointer
from megatron_hybrid.data.errors import DataError

PROBE_BYTES = 16 << 10
"""Bytes per window that are probed for another type."""
_LEAST_PROBE_BYTES = 128  # fewer bytes are not conclusive
_LONGEST_HEADER = 1 << 16
_NUMPY_MAGIC = b"\x93NUMPY"
_TEXT = np.frombuffer(string.printable.encode(), np.uint8)


class RawTokens(NamedTuple):
    """Type and position of the tokens of a shard."""

    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first token."""
    num_tokens: int


def raw_dtype(path: str, dtype_name: str | None, vocab_size: int) -> RawTokens:
    """Return type and place of a shard's tokens: from NumPy's header, the configuration, or the size of the vocabulary.

    Raises:
        DataError: the file is missing, empty or truncated, has a bad header, or its content contradicts the type.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(PROBE_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if head.startswith(_NUMPY_MAGIC):
        return _with_header(path, size, dtype_name)
    if is_lfs_pointer(head):
        raise DataError(f"{path}: {LFS_REMEDY}")
    dtype = np.dtype(dtype_name or ("uint16" if vocab_size <= 1 << 16 else "uint32")).newbyteorder("<")
    if size == 0:
        raise DataError(f"{path}: empty")
    if left := size % dtype.itemsize:
        raise DataError(
            f"{path}: truncated at byte {size}: "
            f"{left} bytes of a {dtype.itemsize}-byte token follow byte {size - left} "
            f"(read as {dtype.name}: if that is wrong, give the source's dtype)"
        )
    tokens = np.frombuffer(head, dtype, count=len(head) // dtype.itemsize)
    if problem := contradiction(tokens, vocab_size):
        raise DataError(f"{path}: byte 0: {problem}")
    return RawTokens(dtype, 0, size // dtype.itemsize)


def _with_header(path: str, size: int, dtype_name: str | None) -> RawTokens:
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version > (1, 0) and int.from_bytes(file.peek(4)[:4], "little") > _LONGEST_HEADER:
                raise ValueError(f"longer than {_LONGEST_HEADER} bytes")
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            offset = file.tell()
    except (ValueError, SyntaxError, TypeError) as error:
        raise DataError(f"{path}: byte 0: bad NumPy header: {error}") from error
    if dtype.kind not in "ui" or len(shape) != 1:
        raise DataError(f"{path}: byte 0: NumPy header has {dtype} {list(shape)}; tokens are a flat array of integers")
    if dtype_name is not None and dtype.newbyteorder("=") != np.dtype(dtype_name):
        raise DataError(
            f"{path}: byte 0: NumPy header has {dtype.name}, the configuration {dtype_name}: leave dtype out"
        )
    end = offset + shape[0] * dtype.itemsize
    if shape[0] == 0:
        raise DataError(f"{path}: empty")
    if size != end:
        what = f"truncated at byte {size}" if size < end else f"bytes left over after byte {end}"
        raise DataError(f"{path}: {what}: its NumPy header has {shape[0]} tokens, {end} bytes")
    return RawTokens(dtype, offset, shape[0])


def contradiction(tokens: np.ndarray, vocab_size: int) -> str | None:
    """Return why tokens cannot be of the type they were read as, with the remedy, or None.

    Args:
        tokens: a window of a shard that begins at an even token [n].
    """
    if tokens.dtype.kind != "u" or tokens.dtype.itemsize not in (2, 4) or tokens.nbytes < _LEAST_PROBE_BYTES:
        return None
    window = np.ascontiguousarray(tokens[: PROBE_BYTES // tokens.dtype.itemsize])
    if np.isin(window.view(np.uint8), _TEXT).all():
        return "the file holds text, not tokens: tokenize it with megatron-hybrid preprocess"
    name = tokens.dtype.name
    words = np.ascontiguousarray(window, window.dtype.newbyteorder("<")).view("<u2")
    high = (vocab_size - 1) >> 16  # upper half of the largest token
    quads = words[: len(words) // 4 * 4].reshape(-1, 4)
    if _is_padding(quads[:, 1], high) and _is_padding(quads[:, 2:], 0) and _is_data(quads[:, 0], high):
        return (
            f"read as {name}, most tokens are 0 in the pattern of 64-bit integers. Convert the file: "
            "np.fromfile(PATH, '<i8').astype('<u4').tofile(NEW_PATH), and set the source's dtype to uint32"
        )
    if tokens.dtype.itemsize == 4:
        return None
    pairs = words[: len(words) // 2 * 2].reshape(-1, 2)
    for data, padding, order in ((0, 1, "little"), (1, 0, "big")):
        if _is_padding(pairs[:, padding], high) and _is_data(pairs[:, data], high):
            largest = f"at most {high}" if high else "0"
            remedy = (
                "Set the source's dtype to uint32" if order == "little" else "Convert the file to little-endian uint32"
            )
            return f"read as uint16, every second token is {largest}: the tokens are {order}-endian uint32. {remedy}"
    return None


def _is_padding(words: np.ndarray, high: int) -> bool:
    """Return True if words can be the upper halves of tokens."""
    return bool((words <= high).all())


def _is_data(words: np.ndarray, high: int) -> bool:
    """Return True if words look like the lower halves of tokens, which are mostly larger than upper halves."""
    return bool((words > high).mean() > 0.5)


def fitting_types(tokens: np.ndarray, vocab_size: int) -> list[str]:
    """Return other types with which all of these bytes are tokens of the vocabulary, if most are not with the given type."""
    window = np.ascontiguousarray(tokens[: PROBE_BYTES // tokens.dtype.itemsize // 4 * 4])
    if window.nbytes < _LEAST_PROBE_BYTES or (window >= vocab_size).mean() < 0.5:
        return []
    names = {"uint16": "<u2", "uint32": "<u4", "big-endian uint16": ">u2", "big-endian uint32": ">u4"}
    others = {name: np.dtype(code) for name, code in names.items() if np.dtype(code) != tokens.dtype}
    sizes = {name: other for name, other in others.items() if window.nbytes % other.itemsize == 0}
    fitting = [name for name, other in sizes.items() if int(window.view(other).max()) < vocab_size]
    return fitting or (["uint8"] if int(window.view(np.uint8).max()) < vocab_size else [])
