"""Streams of compressed input. An incomplete file is an error.

gzip, Zstandard, bzip2 and xz are recognized by their first bytes, whatever the file's name. zstandard's own stream
reader ends quietly at a cut frame, so the streams are decompressed here, frame by frame.
"""

import bz2
import io
import lzma
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from megatron_hybrid.base.lfs import LFS_REMEDY, POINTER_BYTES, is_lfs_pointer
from megatron_hybrid.data.errors import BadRecord, DataError

_CHUNK = 1 << 16
_CONTENT = 1 << 20  # bytes of content per call: 64 KiB of input can hold gigabytes
_ZSTD_INPUT = 1 << 10  # bytes of input per call, which hold at most 32 MiB
_MAX_WINDOW = 1 << 31  # frames written with `zstd --long=31`
_MAGIC = {
    "gzip": (b"\x1f\x8b\x08",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))),  # and skippable frames
    "bzip2": tuple(b"BZh%d" % n + block for n in range(1, 10) for block in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")),
    "xz": (b"\xfd7zXZ\x00",),
}
_CODECS = {
    ".gz": "gzip",
    ".bgz": "gzip",
    ".tgz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "lzma",  # its files have no magic
}
COMPRESSED_SUFFIXES = frozenset(_CODECS)
UNSUPPORTED_SUFFIXES = {
    ".lz4": "lz4 -d",
    ".br": "brotli -d",
    ".snappy": "snzip -d",
    ".sz": "snzip -d",
    ".lzo": "lzop -d",
    ".z": "uncompress",
    ".zip": "unzip",
    ".7z": "7z x",
    ".rar": "unrar x",
}
"""Unsupported compressions, with a command that unpacks them."""
_UNSUPPORTED_MAGIC = {
    b"\x04\x22\x4d\x18": ".lz4",
    b"\x02\x21\x4c\x18": ".lz4",
    b"\xff\x06\x00\x00sNaPpY": ".snappy",
    b"\x89LZO\x00": ".lzo",
    b"\x1f\x9d": ".z",
    b"PK\x03\x04": ".zip",
    b"PK\x05\x06": ".zip",
    b"7z\xbc\xaf\x27\x1c": ".7z",
    b"Rar!\x1a\x07": ".rar",
}


class InputStream(io.BufferedReader):
    """Stream of a file's decompressed bytes."""

    raw: Any

    def consumed_bytes(self) -> int:
        """Return the bytes of the file on disk read so far, for progress."""
        return self.raw.source.tell() if isinstance(self.raw, _Decompressed) else self.raw.tell()


def open_input(path: str | Path) -> InputStream:
    """Open a file for reading bytes, decompressed if it is compressed.

    Raises:
        BadRecord: when opened or while being read: the file cannot be read, is truncated, corrupt or a Git LFS pointer,
            or has a compression that is not supported.
    """
    try:
        source = Path(path).open("rb", buffering=0)  # noqa: SIM115 (the stream closes it)
    except OSError as error:
        raise BadRecord(f"{path}: cannot be read: {error.strerror}", "unreadable_file") from error
    try:
        head = source.read(POINTER_BYTES)
        source.seek(0)
        codec = _find_codec(path, head)
    except DataError:
        source.close()
        raise
    return InputStream(_Decompressed(source, path, codec) if codec else source, buffer_size=1 << 20)


def _find_codec(path: str | Path, head: bytes) -> str | None:
    """Return the compression of a file, or None."""
    if is_lfs_pointer(head):
        raise BadRecord(f"{path}: {LFS_REMEDY}", "git_lfs_pointer")
    for codec, magics in _MAGIC.items():
        if head.startswith(magics):
            return codec
    suffix = os.path.splitext(path)[1].lower()
    found = next((found for magic, found in _UNSUPPORTED_MAGIC.items() if head.startswith(magic)), suffix)
    if found in UNSUPPORTED_SUFFIXES:
        raise BadRecord(
            f"{path}: {found} compression or archives are not read: unpack it first (`{UNSUPPORTED_SUFFIXES[found]}`) "
            "or compress it as .zst or .gz",
            "unsupported_format",
        )
    named = _CODECS.get(suffix)
    if named in _MAGIC and not any(magic.startswith(head) for magic in _MAGIC[named]):
        raise BadRecord(
            f"{path}: corrupt near byte 0: named {suffix}, but it does not begin as {named} does. "
            "If it is already decompressed, rename it",
            "corrupt_file",
        )
    return named


class _Frame:
    """Decompressor of one frame or member that returns a bounded part of its content per call."""

    def __init__(self, codec: str) -> None:
        self._codec = codec
        self._decompressor = _new_decompressor(codec)
        self.has_more = False
        """True if it has content left that needs no further input."""

    @property
    def ended(self) -> bool:
        return bool(self._decompressor.eof)

    def decompress(self, data: memoryview) -> tuple[bytes, memoryview]:
        """Return the next part of the content, and the input that was not used."""
        decompressor = self._decompressor
        if self._codec == "zstd":  # its decompressor has no limit, but a block of 4 bytes or more holds at most 128 KiB
            content, rest = decompressor.decompress(data[:_ZSTD_INPUT]), data[_ZSTD_INPUT:]
        else:
            content, rest = decompressor.decompress(data, _CONTENT), memoryview(b"")
        if decompressor.eof:
            rest = memoryview(decompressor.unused_data + bytes(rest))
        elif self._codec == "gzip":
            rest = memoryview(decompressor.unconsumed_tail)
        self.has_more = self._codec != "zstd" and not decompressor.eof and len(content) == _CONTENT
        return content, rest


def _new_decompressor(codec: str) -> Any:
    if codec == "gzip":
        return zlib.decompressobj(wbits=31)  # with gzip's header and checksum
    if codec == "bzip2":
        return bz2.BZ2Decompressor()
    if codec in ("xz", "lzma"):
        return lzma.LZMADecompressor()
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()


class _Decompressed(io.RawIOBase):
    """Stream of a compressed file with one or more members or frames."""

    def __init__(self, source: BinaryIO, path: str | Path, codec: str):
        self.source = source
        self._path, self._codec = path, codec
        self._ready = memoryview(b"")  # decompressed, not yet handed out
        self._input = memoryview(b"")  # read, not yet decompressed
        self._frame: _Frame | None = None  # None between frames
        self._frames = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.source.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._input and not (self._frame and self._frame.has_more):
                self._input = memoryview(self.source.read(_CHUNK))
                if not self._input:
                    if self._frame is not None or self._frames == 0:
                        raise BadRecord(
                            f"{self._path}: truncated at byte {self.source.tell()}: the compressed stream has no end; "
                            "copy or download the file again",
                            "truncated_file",
                        )
                    return 0
            self._ready = memoryview(self._decompress())
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> bytes:
        """Return the next part of the content, up to the end of the frame at most."""
        data = self._input
        if self._frame is None:
            if self._codec in ("gzip", "xz") and self._frames:
                data = self._input = memoryview(bytes(data).lstrip(b"\0"))  # both allow zeros after the last member
                if not data:
                    return b""
            self._frame = _Frame(self._codec)
        try:
            content, self._input = self._frame.decompress(data)
        except Exception as error:  # zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError of bz2
            near = self.source.tell() - len(data)
            raise BadRecord(f"{self._path}: corrupt near byte {near}: {error}", "corrupt_file") from error
        if self._frame.ended:
            self._frame = None
            self._frames += 1
        return content
