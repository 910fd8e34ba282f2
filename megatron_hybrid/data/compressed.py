"""Reading .gz and .zst as a stream, where an incomplete file is an error.

zstandard's own stream reader ends quietly at a cut frame, so the streams are decompressed here, frame by frame.
"""

import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hybrid.data.errors import DataError

_CHUNK = 1 << 16
_MAX_WINDOW = 1 << 31  # frames written with `zstd --long=31`


class InputStream(io.BufferedReader):
    """A file's (decompressed) bytes."""

    raw: Any

    def consumed_bytes(self) -> int:
        """Bytes of the file on disk read so far, for progress."""
        return self.raw.source.tell() if isinstance(self.raw, _Decompressed) else self.raw.tell()


def open_input(path: str | Path) -> InputStream:
    """Open a file for reading bytes; .gz and .zst are decompressed on the way.

    Raises:
        DataError: when opened or while being read: the file cannot be read, is truncated or corrupt.
    """
    try:
        source = Path(path).open("rb", buffering=0)  # noqa: SIM115 (the stream closes it)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    suffix = Path(path).suffix
    if suffix in (".gz", ".zst"):
        return InputStream(_Decompressed(source, path, suffix), buffer_size=1 << 20)
    return InputStream(source, buffer_size=1 << 20)


class _Decompressed(io.RawIOBase):
    """The content of a .gz or .zst of one or more members or frames."""

    def __init__(self, source: BinaryIO, path: str | Path, suffix: str):
        self.source = source
        self._path, self._suffix = path, suffix
        self._ready = memoryview(b"")  # decompressed, not yet handed out
        self._input = b""  # read, not yet decompressed
        self._frame: Any = None  # the decompressor inside a frame; None between frames
        self._frames = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.source.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._input:
                self._input = self.source.read(_CHUNK)
                if not self._input:
                    if self._frame is not None or self._frames == 0:
                        raise DataError(
                            f"{self._path}: truncated at byte {self.source.tell()}: the compressed stream has no end; "
                            "copy or download the file again"
                        )
                    return 0
            self._ready = memoryview(self._decompress())
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> bytes:
        """Content of what was read: up to the end of the frame at most."""
        data, self._input = self._input, b""
        if self._frame is None:
            if self._suffix == ".gz" and self._frames:
                data = data.lstrip(b"\0")  # gzip allows zeros after the last member
                if not data:
                    return b""
            self._frame = self._new_frame()
        try:
            content: bytes = self._frame.decompress(data)
        except Exception as error:  # zlib.error, zstandard.ZstdError
            near = self.source.tell() - len(data)
            raise DataError(f"{self._path}: corrupt near byte {near}: {error}") from error
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
            self._frames += 1
        return content

    def _new_frame(self) -> Any:
        if self._suffix == ".gz":
            return zlib.decompressobj(wbits=31)  # with gzip's header and checksum
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
