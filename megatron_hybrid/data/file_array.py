"""Arrays in files, read with `pread`.

Files are not mapped into memory: a mapped file that is truncated during a run ends the process by SIGBUS, which names no file.
"""

import os
from bisect import bisect_left
from typing import Any, overload

import numpy as np

from megatron_hybrid.data.errors import DataError


class OpenFile:
    """File descriptor that is closed after its last reader has released it, so that no reader uses a reused number."""

    def __init__(self, path: str) -> None:
        """Open a file. Raises OSError."""
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, offset: int, count: int) -> bytes:
        """Return bytes [offset, offset + count).

        Raises:
            DataError: the file cannot be read, or has become shorter.
        """
        try:
            data = os.pread(self.descriptor, count, offset)
            while len(data) < count and (more := os.pread(self.descriptor, count - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        if len(data) < count:
            raise DataError(
                f"{self.path}: ends before byte {offset + count}: it was cut short since it was opened. Restore it and start again"
            )
        return data


class FileArray:
    """One-dimensional array in a file. Reading is thread-safe.

    Args:
        offset: bytes before the first element.
        count: number of elements.

    Raises:
        DataError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], dtype: np.dtype[Any], offset: int, count: int) -> None:
        self.dtype, self._offset, self._count = np.dtype(dtype), offset, count
        try:
            self._file = OpenFile(os.fspath(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> np.ndarray: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            return self._read(start, max(start, stop))[::step]
        place = index + self._count if index < 0 else index
        if not 0 <= place < self._count:
            raise IndexError(f"element {index} of {self._count}")
        return self._read(place, place + 1)[0]

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """Return the elements with these indices, which are inside the array: [len(indices)]. Few reads if they ascend."""
        if not len(indices):
            return np.empty(0, self.dtype)
        low, high = int(indices.min()), int(indices.max())
        if high - low < 8 * len(indices) + 1024:
            found: np.ndarray = self._read(low, high + 1)[indices - low]
            return found
        half = len(indices) // 2 or 1
        return np.concatenate([self.gather(indices[:half]), self.gather(indices[half:])])

    def searchsorted(self, value: int) -> int:
        """Return the first index in an ascending array at which `value` could be inserted, in log n reads."""
        return bisect_left(self, value)

    def _read(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize
        return np.frombuffer(self._file.read(self._offset + start * size, (stop - start) * size), self.dtype)


def open_npy(path: str | os.PathLike[str]) -> FileArray:
    """Open a one-dimensional array that `np.save` wrote.

    Raises:
        DataError, OSError, ValueError: the file cannot be read or is not such an array.
    """
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version} of NumPy's format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if len(shape) != 1 or dtype.hasobject or size != offset + shape[0] * dtype.itemsize:
        raise ValueError(f"{size} bytes are no array of {list(shape)} {dtype}")
    return FileArray(path, dtype, offset, shape[0])
