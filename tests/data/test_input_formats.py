"""Formats by content: documents are read under any name, and what is no text is refused by name."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
import zstandard

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data import documents
from megatron_hybrid.data.documents import find_files, iterate_batches, parse_batch
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.preprocess import preprocess
from megatron_hybrid.data.records import ReadOptions, Skipped
from megatron_hybrid.data.sources import open_source
from tests.base.test_lfs import POINTER
from tests.data.files import write_indexed

LINES = b'{"text": "alpha"}\n{"text": "beta"}\n'
PACK = {
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "plain": bytes,
}


def texts(inputs, options=ReadOptions(), skipped=None, **how):  # noqa: B008 (frozen)
    files = find_files(inputs, options=options, skipped=skipped, **how)
    kinds = []
    found = [t for b in iterate_batches(files, options, skipped) for _, t in parse_batch(b, options, kinds)]
    if skipped is not None:
        skipped.update(kinds)
    return found


def write(folder, name, data):
    (folder / name).write_bytes(data)
    return folder / name


JSON_NAMES = (
    "a.jsonl A.JSONL a.JsonL a.ndjson a.jsonlines a.jl a.json a.ldjson part-00000 part-00000-a1.json x a.dat 1.0"
)


@pytest.mark.parametrize("name", JSON_NAMES.split())
@pytest.mark.parametrize("pack", PACK)
def test_json_lines_under_any_name(tmp_path, name, pack):
    assert texts([write(tmp_path, name, PACK[pack](LINES))]) == ["alpha", "beta"]
    assert texts([tmp_path], include=["*"]) == ["alpha", "beta"]


@pytest.mark.parametrize("suffix", [".gz", ".GZ", ".zst", ".bz2", ".xz", ".unknown", ""])
@pytest.mark.parametrize("pack", ["gzip", "zstd", "bzip2", "xz"])
def test_compression_is_told_by_content(tmp_path, suffix, pack):
    assert texts([write(tmp_path, f"a.jsonl{suffix}", PACK[pack](LINES[:18]) + PACK[pack](LINES[18:]))]) == [
        "alpha",
        "beta",
    ]
    assert texts([write(tmp_path, f"a.txt{suffix}", PACK[pack](b"notes"))], kind="text") == ["notes"]


def test_old_lzma_and_skippable_frames(tmp_path):
    assert texts([write(tmp_path, "a.jsonl.lzma", lzma.compress(LINES, lzma.FORMAT_ALONE))]) == ["alpha", "beta"]
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    assert texts([write(tmp_path, "a.zst", skippable + PACK["zstd"](LINES) + skippable)]) == ["alpha", "beta"]


@pytest.mark.parametrize("pack", ["bzip2", "xz"])
@pytest.mark.parametrize("keep", [-1, 20, 7])
def test_cut_bzip2_and_xz(tmp_path, pack, keep):
    suffix = {"bzip2": ".bz2", "xz": ".xz"}[pack]
    with pytest.raises(DataError, match="truncated at byte"):
        texts([write(tmp_path, f"a.jsonl{suffix}", PACK[pack](LINES)[:keep])])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\xef\xbb\xbf" + LINES, ["alpha", "beta"]),
        (b"\n\r\n \n" + LINES, ["alpha", "beta"]),
        (LINES.replace(b"\n", b"\r\n"), ["alpha", "beta"]),
        (b"\xef\xbb\xbf" + LINES[:18] + b"\xef\xbb\xbf" + LINES[18:] + b"\xef\xbb\xbf\n", ["alpha", "beta"]),
        (LINES[:-1], ["alpha", "beta"]),
        (b'{"text": "' + b"x" * 200_000 + b'"}', ["x" * 200_000]),  # longer than what is looked at
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "part-00000"])
def test_marks_blank_lines_and_line_ends(tmp_path, name, data, expected):
    assert texts([write(tmp_path, name, data)]) == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", LINES, "JSON lines under the name of a text file: use --format jsonl .* or --format text"),
        ("a.json", json.dumps([{"text": "a"}]).encode(), r"a JSON array, not JSON lines: .*jq -c '\.\[\]'"),
        ("a.json", json.dumps([{"text": "a" * 99_999}] * 2, indent=1).encode(), r"a JSON array, .*jq -c"),
        ("a.json", b"[\n" + LINES, "a JSON array"),
        ("part-0", b'["a", "b"]', "a JSON array"),
        ("a.json", json.dumps({"text": "a"}, indent=2).encode(), "JSON over several lines, .*jq -c . FILE"),
        ("a.jsonl", b'{"text":\n"a"}', "JSON over several lines"),
        ("a.csv", b"id,text\n1,a\n", "a table, not documents"),
        ("a.tsv.gz", gzip.compress(b"id\ttext\n", mtime=0), "a table, not documents"),
        ("a.dat", b"plain text", "unknown format: use --format text .* or --format jsonl"),
        ("notes", b"plain text", "unknown format"),
        ("part-00000", b"plain text", "unknown format"),
        ("a.txt", b"a\0b", "binary data .a NUL byte at byte 1.|byte 1: binary data"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16 text, .*iconv -f UTF-16"),
        ("a.txt", "text".encode("utf-32"), "UTF-32 text"),
        ("a.jsonl.gz", LINES, "corrupt near byte 0: named .gz, .*rename it"),
    ],
)
def test_what_is_not_taken_for_text(tmp_path, name, data, message):
    with pytest.raises(DataError, match=message):
        texts([write(tmp_path, name, data)])


def archive(module_open):
    buffer = io.BytesIO()
    with module_open(buffer) as file:
        if isinstance(file, zipfile.ZipFile):
            file.writestr("a.jsonl", LINES)
        else:
            file.addfile(tarfile.TarInfo("a.jsonl"))
    return buffer.getvalue()


def numpy_file(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ZEROS = bytes(64)
BINARY = {
    "ORC": b"ORC" + ZEROS,
    "Avro": b"Obj\x01" + ZEROS,
    "Arrow": b"ARROW1\0\0" + ZEROS,
    "an Arrow stream": b"\xff\xff\xff\xff" + ZEROS,
    "Feather": b"FEA1" + ZEROS,
    "encrypted Parquet": b"PARE" + ZEROS,
    "SQLite": b"SQLite format 3\0" + ZEROS,
    "HDF5": b"\x89HDF\r\n\x1a\n" + ZEROS,
    "a NumPy array": numpy_file(np.arange(5)),
    "the index of a tokenized dataset": b"MMIDIDX\0\0" + ZEROS,
    "safetensors": (64).to_bytes(8, "little") + b'{"a":{}}' + ZEROS,
    "a Python pickle": b"\x80\x04]\x94." + ZEROS,
    "a PNG image": b"\x89PNG\r\n\x1a\n" + ZEROS,
    "a JPEG image": b"\xff\xd8\xff\xe0" + ZEROS,
    "PDF": b"%PDF-1.7\ntext only",
    "WARC": b"WARC/1.0\r\nWARC-Type: warcinfo\r\n",
    ".zip compression": archive(lambda buffer: zipfile.ZipFile(buffer, "w")),
    "a tar archive": archive(lambda buffer: tarfile.TarFile(fileobj=buffer, mode="w")),
    ".lz4 compression": b"\x04\x22\x4d\x18" + ZEROS,
    ".snappy compression": b"\xff\x06\x00\x00sNaPpY" + ZEROS,
    ".7z compression": b"7z\xbc\xaf\x27\x1c" + ZEROS,
    "a Git LFS pointer": POINTER,
}


@pytest.mark.parametrize("what", BINARY)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.bin", "part-00000"])
def test_other_formats_are_named(tmp_path, what, name):
    """Alone, in a folder, and next to a file that can be read; never left out if the user named the file."""
    file, skip = write(tmp_path, name, BINARY[what]), ReadOptions(bad_records="skip")
    for options in (ReadOptions(), skip):
        with pytest.raises(DataError, match=f"{name}: {what}"):
            texts([file], options)
    write(tmp_path, "good.md", b"good")
    with pytest.raises(DataError, match=f"{name}: {what}.*--bad-records skip"):
        texts([tmp_path], include=["*"])
    skipped = Skipped()
    assert [text for text in texts([tmp_path], skip, skipped, include=["*"]) if text] == ["good"]
    assert skipped.files.total() + skipped.documents.total() == 1


def test_a_compressed_tar_is_named(tmp_path):
    with pytest.raises(DataError, match="a.tgz: a tar archive"):
        texts([write(tmp_path, "a.tgz", gzip.compress(BINARY["a tar archive"]))])


@pytest.mark.parametrize("name", ["a.jsonl.lz4", "a.jsonl.br", "a.jsonl.snappy", "a.jsonl.Z"])
def test_compressions_without_magic_are_named(tmp_path, name):
    with pytest.raises(DataError, match="compression or archives are not read: unpack it first"):
        texts([write(tmp_path, name, b"\x0b\x02\x80")])


@pytest.mark.parametrize(
    ("name", "data", "kind", "expected"),
    [
        ("a.jsonl", LINES, "text", [LINES.decode()]),
        ("a.py", LINES, "text", [LINES.decode()]),
        ("a.csv", b"a,b\n", "text", ["a,b\n"]),
        ("a.txt", b"a\0b", "text", ["a\0b"]),
        ("a.txt", LINES, "jsonl", ["alpha", "beta"]),
        ("a.csv", LINES, "jsonl", ["alpha", "beta"]),
    ],
)
def test_the_format_can_be_given(tmp_path, name, data, kind, expected):
    assert texts([write(tmp_path, name, data)], kind=kind) == expected


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.py", b"{1: 2}\nORC = 1\r\n"),
        ("a.jl", b"# Julia\nx = [1, 2]\n"),
        ("a.md", b"[a](b)"),
        ("a.ini", b"[section]\nkey = 1"),
        ("a.ipynb", json.dumps({"cells": []}, indent=1).encode()),
        ("a.c", "ORC é".encode()),
        ("a.zzz", b"a language of its own"),
        ("Makefile", b"all:\n\ttrue"),
        ("a.TXT", b"text"),
    ],
)
def test_source_code_and_text(tmp_path, name, data):
    write(tmp_path, name, data)
    assert texts([tmp_path], include=["*"]) == [data.decode()]


@pytest.mark.parametrize("name", ["a.jsonl", "part-00000"])
def test_empty_files_of_records(tmp_path, name):
    for data in (b"", b"\n \n", b"\xef\xbb\xbf"):
        with pytest.raises(DataError, match=f"{name}: empty"):
            texts([write(tmp_path, name, data)])


def test_pipes_and_missing_files_are_told_apart(tmp_path):
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(DataError, match="a link to a missing file"):
        texts([tmp_path / "link"])
    with pytest.raises(DataError, match="a pipe or device, not a file"):
        texts(["/dev/null"])


@pytest.fixture
def parquet():
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as module

    def save(path, values, column="text", type_=None, **options):
        module.write_table(
            pyarrow.table({"id": range(len(values)), column: pyarrow.array(values, type_)}), path, **options
        )
        return path

    return save


def test_parquet(tmp_path, parquet, monkeypatch):
    import pyarrow

    monkeypatch.setattr(documents, "BATCH_BYTES", 1000)
    values = [f"document {i} é" * (i % 5) for i in range(2000)]
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    for i, type_ in enumerate(kinds):
        file = parquet(tmp_path / f"{i}.parquet", values, type_=type_, row_group_size=300)
        assert texts([file]) == values
    assert texts([tmp_path], include=["*.parquet"]) == values * 3
    progress = [batch.consumed for batch in iterate_batches(find_files([file]))]
    assert len(progress) > 5 and progress == sorted(progress) and progress[-1] == file.stat().st_size
    assert texts([parquet(tmp_path / "named", values, column="body")], ReadOptions(json_key="body")) == values


def test_a_byte_order_mark_is_text_in_a_row_of_a_table(tmp_path, parquet):
    values = ["\ufeffa", "\ufeff", "b\ufeff"]
    assert texts([parquet(tmp_path / "marks.parquet", values)]) == values
    lines = tmp_path / "marks.jsonl"
    lines.write_text("\ufeff" + "".join(json.dumps({"text": value}) + "\n" for value in values), encoding="utf-8")
    assert texts([lines]) == values


def test_bad_parquet(tmp_path, parquet):
    skip, skipped = ReadOptions(bad_records="skip"), Skipped()
    nulls = parquet(tmp_path / "nulls.parquet", ["a", None, "b"])
    with pytest.raises(DataError, match="nulls.parquet:2: column 'text' is null"):
        texts([nulls])
    assert texts([nulls], skip, skipped) == ["a", None, "b"] and skipped.documents == {"null": 1}
    binary = parquet(tmp_path / "binary.parquet", [b"a", b"\xff"])
    with pytest.raises(DataError, match="binary.parquet:2: byte 0: not UTF-8"):
        texts([binary])
    with pytest.raises(DataError, match=r"no column 'body' \(it has: id, text\); name it with --json-key"):
        texts([nulls], ReadOptions(json_key="body"))
    with pytest.raises(DataError, match="column 'id' holds int64, not strings"):
        texts([nulls], ReadOptions(json_key="id"))
    with pytest.raises(DataError, match="empty.parquet: empty"):
        texts([parquet(tmp_path / "empty.parquet", [], type_="string")])
    cut = write(tmp_path, "cut.parquet", nulls.read_bytes()[:-9])
    with pytest.raises(DataError, match="cut.parquet: corrupt or truncated Parquet"):
        texts([cut])


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    file = write(tmp_path, "a.parquet", b"PAR1" + ZEROS)
    for options in (ReadOptions(), ReadOptions(bad_records="skip")):
        with pytest.raises(DataError, match=r"reading Parquet needs pyarrow: pip install 'megatron-hybrid\[parquet\]'"):
            preprocess([file], tmp_path / "o", options=options)


@pytest.mark.parametrize("suffix", [".npy", ".bin", ".idx"])
def test_git_lfs_pointers_among_token_files(tmp_path, suffix):
    prefix = write_indexed(tmp_path / "a", [[1, 2]])
    write(tmp_path, f"a{suffix}", POINTER)
    for path in {".npy": [f"{prefix}.npy", f"{tmp_path}/*.npy"]}.get(suffix, [prefix]):
        with pytest.raises(DataError, match=f"a{suffix}: a Git LFS pointer.*git lfs pull"):
            open_source(SourceConfig(path=path), 300)
