"""Tokens beyond the vocabulary are found, named, and not looked for twice."""

import json
import os

import numpy as np
import pytest

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data import validate
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.sources import open_source
from megatron_hybrid.data.validate import VerdictCache, validate_source
from tests.data.files import write_indexed, write_raw


def check(path, vocab_size, cache=None, **config):
    validate_source(open_source(SourceConfig(path=str(path), **config), vocab_size), vocab_size, cache)


@pytest.fixture
def scans(monkeypatch):
    """Paths of the shards scanned."""
    seen = []
    real = validate.scan

    def scan(shard, *arguments):
        seen.append(os.path.basename(shard.path))
        return real(shard, *arguments)

    monkeypatch.setattr(validate, "scan", scan)
    return seen


@pytest.mark.parametrize("place", [0, 1, 12345, 99_999])
@pytest.mark.parametrize(("dtype", "vocab_size"), [("uint16", 500), ("uint32", 100_352)])
def test_the_first_bad_token_is_named(tmp_path, monkeypatch, place, dtype, vocab_size):
    monkeypatch.setattr(validate, "_CHUNK_BYTES", 4096)
    tokens = np.zeros(100_000, dtype)
    tokens[place] = vocab_size
    tokens[-1] = vocab_size
    path = write_raw(tmp_path / "a.npy", tokens, dtype)
    offset = place * tokens.itemsize
    with pytest.raises(DataError, match=rf"a.npy: byte {offset}: token {vocab_size} \(number {place}, {dtype}\)"):
        check(path, vocab_size)
    check(path, vocab_size + 1, **({"dtype": dtype} if dtype == "uint32" else {}))


def test_negative_tokens(tmp_path):
    prefix = write_indexed(tmp_path / "a", [[1, 2], [3, -1]], "int32")
    with pytest.raises(DataError, match=r"a.bin: byte 12: token -1"):
        check(prefix, 1000)


def test_behind_a_numpy_header(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 2, 300], np.uint16))
    with pytest.raises(DataError, match=r"a.npy: byte 132: token 300 \(number 2"):
        check(tmp_path / "a.npy", 300)


def test_the_first_bad_shard_is_named(tmp_path):
    for i in range(20):
        write_raw(tmp_path / f"{i:02}.npy", [1, 2, 999 if i >= 5 else 3])
    with pytest.raises(DataError, match=r"05.npy: byte 4"):
        check(tmp_path / "*.npy", 999)


def test_the_index_is_checked(tmp_path):
    prefix = write_indexed(tmp_path / "a", [[1, 2], [3, 4]])
    data = bytearray((tmp_path / "a.idx").read_bytes())
    data[34] = 1  # first sequence's length
    (tmp_path / "a.idx").write_bytes(data)
    with pytest.raises(DataError, match=r"a.idx: byte 50: sequence pointer 4"):
        check(prefix, 1000)


def test_a_type_that_cannot_exceed_the_vocabulary_is_not_scanned(tmp_path, scans):
    check(write_raw(tmp_path / "a.npy", [65535]), 65536)
    check(write_indexed(tmp_path / "b", [[255]], "uint8"), 257)
    assert scans == []
    check(write_raw(tmp_path / "c.npy", [1]), 65535)
    assert scans == ["c.npy"]


def test_a_restart_does_not_scan_again(tmp_path, scans):
    run = tmp_path / "run"
    for name in "ab":
        write_raw(tmp_path / f"{name}.npy", [1, 2, 300])
    prefix = write_indexed(tmp_path / "c", [[1, 2], [3]])
    for _ in range(2):
        check(tmp_path / "*.npy", 1000, VerdictCache(run))
        check(prefix, 1000, VerdictCache(run))
    assert sorted(scans) == ["a.npy", "b.npy", "c.bin"]

    scans.clear()
    check(tmp_path / "*.npy", 301, VerdictCache(run))  # the verdict is the largest token: good for other vocabularies
    assert scans == []
    with pytest.raises(DataError, match="a.npy: byte 4: token 300"):
        check(tmp_path / "*.npy", 300, VerdictCache(run))


def test_a_changed_file_is_scanned_again(tmp_path, scans):
    path, run = write_raw(tmp_path / "a.npy", [1, 2]), tmp_path / "run"
    check(path, 1000, VerdictCache(run))
    stat = os.stat(path)
    write_raw(path, [1, 2000])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(DataError, match="token 2000"):
        check(path, 1000, VerdictCache(run))
    write_raw(path, [1, 2, 3, 4])
    check(path, 1000, VerdictCache(run))
    assert len(scans) == 3


def test_reading_as_another_type_is_another_verdict(tmp_path):
    path, cache = write_raw(tmp_path / "a.npy", [1, 1, 1, 1]), VerdictCache(tmp_path / "run")
    check(path, 1000, cache)
    with pytest.raises(DataError, match=r"byte 0: token 65537 \(number 0, uint32\)"):
        check(path, 1000, cache, dtype="uint32")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"PATH": 3}', '{"PATH": {"is": 1, "max_token": 0}}', "\x00"])
def test_an_unreadable_cache_is_no_cache(tmp_path, content, scans):
    path, run = write_raw(tmp_path / "a.npy", [1, 2]), tmp_path / "run"
    run.mkdir()
    (run / "validated_data.json").write_text(content.replace("PATH", path))
    check(path, 1000, VerdictCache(run))
    assert scans == ["a.npy"]
    assert json.loads((run / "validated_data.json").read_text())[path]["max_token"] == 2


def test_two_processes_add_to_one_cache(tmp_path, scans):
    a, b, run = write_raw(tmp_path / "a.npy", [1]), write_raw(tmp_path / "b.npy", [1]), tmp_path / "run"
    first, second = VerdictCache(run), VerdictCache(run)
    check(a, 1000, first)
    check(b, 1000, second)
    check(a, 1000, VerdictCache(run))
    check(b, 1000, VerdictCache(run))
    assert scans == ["a.npy", "b.npy"]
