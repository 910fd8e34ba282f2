"""A few open files, read with `pread`.

Files are not mapped into memory: a mapped file that is truncated ends the process by SIGBUS, which names no file. Pages of a mapped
file also count as resident memory, and all 15 GB of a checkpoint would stay resident.
"""

import os
from collections import OrderedDict
from pathlib import Path

from megatron_hybrid.base.errors import UserError


class OpenFiles:
    """A few open files, and reusable memory to read them into."""

    def __init__(self, error: type[UserError], limit: int = 32) -> None:
        """Create it without open files. error: raised for a file that has become too short."""
        self._error, self._limit = error, limit
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._buffers = [bytearray(), bytearray(), bytearray()]

    def buffer(self, nbytes: int) -> memoryview:
        """Return memory for a block. It is reused two blocks later; fresh memory would cost a page fault every 4 KiB."""
        memory = self._buffers.pop(0)
        if len(memory) < nbytes:
            memory = bytearray(nbytes)
        self._buffers.append(memory)
        return memoryview(memory)[:nbytes]

    def descriptor(self, path: Path) -> int:
        """Return a file descriptor, which is valid until `limit` other files are opened."""
        if path not in self._open:
            if len(self._open) >= self._limit:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(path)
        return self._open[path]

    def read_into(self, path: Path, at: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `at`.

        Raises:
            UserError: of the type `error`; the file has become shorter than its header said.
        """
        descriptor, done = self.descriptor(path), 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], at + done)
            if count == 0:
                raise self._error(f"{path}: ends at byte {at + done}; was it changed while it was read?")
            done += count

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
