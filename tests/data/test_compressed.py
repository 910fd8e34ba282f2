"""Compressed input, written by gzip and zstandard themselves."""

import gzip
import random

import pytest
import zstandard

from megatron_hybrid.data.compressed import open_input
from megatron_hybrid.data.errors import DataError

CONTENT = random.Random(0).randbytes(300_000) + b"line\n" * 100_000


def gz(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


PACK = {".gz": gz, ".zst": zst, ".txt": bytes}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("frames", [1, 3])
def test_content(tmp_path, suffix, frames):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"".join(PACK[suffix](CONTENT + bytes([i])) for i in range(frames)))
    expected = b"".join(CONTENT + bytes([i]) for i in range(frames))
    with open_input(file) as stream:
        assert stream.read() == expected
        assert stream.consumed_bytes() == file.stat().st_size
    with open_input(file) as stream:
        assert b"".join(stream) == expected  # by lines


def test_zeros_after_a_gz_are_padding(tmp_path):
    file = tmp_path / "a.gz"
    file.write_bytes(gz(b"a") + bytes(100_000))
    assert open_input(file).read() == b"a"


def test_an_empty_frame_is_an_empty_file(tmp_path):
    for suffix in (".gz", ".zst"):
        (tmp_path / f"a{suffix}").write_bytes(PACK[suffix](b""))
        assert open_input(tmp_path / f"a{suffix}").read() == b""


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0, 1, 5, 20, 100_000, -1, -4])
def test_truncated(tmp_path, suffix, keep):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(PACK[suffix](CONTENT)[:keep])
    with pytest.raises(DataError, match=rf"a{suffix}: truncated at byte {file.stat().st_size}"):
        open_input(file).read()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_in_a_later_frame(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(PACK[suffix](b"first") + PACK[suffix](CONTENT)[:50])
    with pytest.raises(DataError, match="truncated"):
        open_input(file).read()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("where", ["magic", "checksum", "after"])
def test_corrupt(tmp_path, suffix, where):
    data = bytearray(PACK[suffix](CONTENT))
    if where == "after":
        data += b"garbage"
    else:
        data[{"magic": 0, "checksum": -5 if suffix == ".gz" else -1}[where]] ^= 1
    file = tmp_path / f"a{suffix}"
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"a{suffix}: corrupt near byte \d+"):
        open_input(file).read()


def test_missing(tmp_path):
    with pytest.raises(DataError, match="nothing.gz: cannot be read: No such file"):
        open_input(tmp_path / "nothing.gz")
