"""Parquet files that expand to gigabytes give a typed error, or are read in bounded memory."""

import struct
from pathlib import Path

import pytest

from megatron_hybrid.data.documents import find_files, iterate_batches
from testing.bounded import outcome, refused
from tests.hostile.test_bounds import read_corpus


def thrift(*fields: tuple[int, bytes], kind: int = 5) -> bytes:
    """Return a struct of Thrift's compact protocol whose fields ascend: (number, value), a number or a struct in bytes."""
    text, before = b"", 0
    for number, value in fields:
        text += bytes([(number - before) << 4 | (12 if isinstance(value, bytes) else kind)])
        text += value if isinstance(value, bytes) else varint(2 * value)
        before = number
    return text + b"\0"


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def parquet_bomb(path: Path, case: str) -> None:
    """Write a small Parquet file whose values are gigabytes."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values, options = ["a" * 100] * 10, dict(compression="zstd")
    if case == "a page":
        values, options = ["\0" * (16 << 20)] * 5, options | dict(use_dictionary=False)
    elif case == "a value":
        values = ["\0" * (40 << 20)]
    elif case == "a dictionary":
        values = [chr(97 + i) * (16 << 20) for i in range(6)]
    parquet.write_table(pyarrow.table({"text": values}), path, **options)
    data = path.read_bytes()
    if case == "a false page header":
        (old,) = {thrift((1, 2), (2, size))[:-1] for size in range(100, 120) if thrift((1, 2), (2, size))[:-1] in data}
        data = data.replace(old, thrift((1, 2), (2, (1 << 31) - 1))[:-1], 1)  # a dictionary page of 2 GiB
    elif case == "a long footer":
        data = data[:4] + bytes(40 << 20) + struct.pack("<I", 40 << 20) + b"PAR1"
    elif case == "no footer":
        data = data[:-8] + struct.pack("<I", (1 << 32) - 1) + b"PAR1"
    path.write_bytes(data)


@pytest.mark.parametrize(
    "case", ["a page", "a value", "a dictionary", "a false page header", "a long footer", "no footer"]
)
def test_parquet(case, tmp_path):
    parquet_bomb(tmp_path / "a.parquet", case)
    assert (tmp_path / "a.parquet").stat().st_size < 41 << 20
    refused(lambda: read_corpus(tmp_path / "a.parquet"))


def test_a_small_dictionary_of_large_values_is_read_in_little_memory(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4000, "int32"), ["\0" * (20 << 20)])
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    batches = iterate_batches(find_files([tmp_path / "a.parquet"]))
    assert outcome(lambda: [next(batches) for _ in range(8)]) == "no error"
