"""Records that cannot be read: the run stops and names them, or leaves them out and counts them."""

import gzip
import json
import pickle
import random

import pytest

from megatron_hybrid.data import documents, encode
from megatron_hybrid.data.errors import BadRecord, DataError
from megatron_hybrid.data.preprocess import describe_skipped, preprocess
from megatron_hybrid.data.records import ReadOptions
from tests.data.test_preprocess import decoded

SKIP = ReadOptions(bad_records="skip")
BAD = {
    b'{"text": "tw': "cut_line",
    b'{"text": "a"': "cut_line",
    b"not JSON": "not_json",
    b'{"text": "a"} {}': "not_json",
    b"[" * 100_000: "not_json",
    b'{"text": "a\0b"}': "not_json",
    b'["a"]': "not_an_object",
    b"7": "not_an_object",
    b'{"id": 3}': "missing_key",
    b'{"text": null}': "null",
    b'{"text": 7}': "not_a_string",
    b'{"text": {"a": "b"}}': "not_a_string",
    b'{"text": "\xff"}': "not_utf8",
    b'{"text": "\\ud800"}': "lone_surrogate",
}


def run(tmp_path, *files, **how):
    return preprocess(files, tmp_path / "out", **{"options": SKIP, "overwrite": True} | how)[str(tmp_path / "out")]


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:20].decode("latin-1"))
def test_kinds(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(
        BadRecord, match="a.jsonl:2: .*To leave out and count such records: --bad-records skip"
    ) as error:
        run(tmp_path, file, options=None)
    assert error.value.kind == BAD[line]
    summary = run(tmp_path, file)
    assert decoded(tmp_path / "out") == ["one", "two"]
    assert summary.skipped_documents == 1 and summary.skipped_by_kind == {BAD[line]: 1}


@pytest.mark.parametrize("workers", [1, 2])
def test_counts(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(documents, "BATCH_BYTES", 50)
    file, empty = tmp_path / "a.jsonl", tmp_path / "empty.jsonl"
    file.write_bytes(b"\n".join([*BAD, b'{"text": "good"}', *BAD, b'{"text": ""}']))
    empty.touch()
    summary = run(tmp_path, empty, file, workers=workers)
    kinds = {kind: 2 * list(BAD.values()).count(kind) for kind in sorted(set(BAD.values()))}
    assert json.loads((tmp_path / "out.json").read_text())["skipped_by_kind"] == kinds
    assert summary.skipped_documents == 2 * len(BAD) and summary.skipped_files == {"empty_file": 1}
    assert (summary.documents, summary.empty_documents) == (1, 1)
    said = describe_skipped(summary)
    assert said.startswith("left out: 28 records (4 cut line, 2 lone surrogate, ") and said.endswith("(1 empty file)\n")


def test_nothing_is_said_of_good_input(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n')
    assert describe_skipped(run(tmp_path, tmp_path / "a.jsonl")) == ""


@pytest.mark.parametrize(
    ("damage", "kept", "kind", "message"),
    [
        (lambda packed: packed[: len(packed) // 2], (490, 510), "truncated_file", "truncated at"),
        (lambda packed: packed[:-6] + b"?" + packed[-5:], (700, 1000), "corrupt_file", "corrupt near"),  # the checksum
    ],
    ids=["cut", "corrupt"],
)
def test_a_damaged_compressed_file_gives_what_lies_before(tmp_path, damage, kept, kind, message):
    texts = [random.Random(i).randbytes(300).hex() for i in range(1000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(lines.encode())))
    (tmp_path / "b.jsonl").write_text('{"text": "the next file"}')
    with pytest.raises(DataError, match=f"a.jsonl.gz: {message} byte"):
        run(tmp_path, tmp_path / "a.jsonl.gz", options=None)
    summary = run(tmp_path, tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl")
    *got, last = decoded(tmp_path / "out")
    assert kept[0] <= len(got) <= kept[1] and got == texts[: len(got)] and last == "the next file"
    assert summary.skipped_by_kind == {kind: 1} and summary.skipped_documents == 1


def test_whole_files(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    files = {
        "a.txt": b"good",
        "b.txt": b"\xff",
        "c.txt": b"a\0b",
        "d.txt": b"%PDF-1.4",
        "e.txt.gz": gzip.compress(b"text" * 99)[:-9],
        "f.jsonl": b"",
        "g.txt": b"",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with pytest.raises(DataError, match="--bad-records skip"):
        run(tmp_path, folder, include=["*"], options=None)
    summary = run(tmp_path, folder, include=["*"])
    assert decoded(tmp_path / "out") == ["good"] and summary.empty_documents == 1
    assert summary.skipped_documents == 3 and summary.skipped_files == {"empty_file": 1, "unsupported_format": 1}
    assert summary.skipped_by_kind == {"binary": 1, "not_utf8": 1, "truncated_file": 1}


@pytest.mark.parametrize(
    ("bad_utf8", "bad_records", "utf8", "other"),
    [
        (None, "error", "error", "error"),
        (None, "skip", "skip", "skip"),
        ("skip", "error", "skip", "error"),
        ("error", "skip", "error", "skip"),
        ("replace", "skip", "replace", "skip"),
        ("replace", "error", "replace", "error"),
    ],
)
def test_both_options(tmp_path, bad_utf8, bad_records, utf8, other):
    options = ReadOptions(bad_utf8=bad_utf8, bad_records=bad_records)
    file = tmp_path / "a.jsonl"
    for line, expected in [(b'{"text": "\xff"}', utf8), (b'{"text": "\\udc00"}', utf8), (b'{"text": null}', other)]:
        file.write_bytes(line + b'\n{"text": "good"}\n')
        if expected == "error":
            with pytest.raises(BadRecord):
                run(tmp_path, file, options=options)
        else:
            summary = run(tmp_path, file, options=options)
            assert decoded(tmp_path / "out") == (["\ufffd"] if expected == "replace" else []) + ["good"]
            assert summary.skipped_documents == (expected == "skip")


def test_documents_that_are_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_MAX_DOCUMENT", 5)
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a long one"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match="a.jsonl:1: 11 tokens; a document has at most 5: cut it.*--bad-records skip"):
        run(tmp_path, file, options=None)
    assert run(tmp_path, file).skipped_by_kind == {"too_long": 1} and decoded(tmp_path / "out") == ["b"]


def test_nothing_but_bad_records_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "a"}\n' * 3)
    with pytest.raises(DataError, match="3 documents, and no text in them"):
        run(tmp_path, tmp_path / "a.jsonl")


def test_the_error_comes_out_of_workers_whole():
    error = pickle.loads(pickle.dumps(BadRecord("a.jsonl:1: broken", "not_json")))
    assert (error.kind, str(error)) == ("not_json", str(BadRecord("a.jsonl:1: broken", "not_json")))
