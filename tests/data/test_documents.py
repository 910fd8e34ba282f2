"""Which files are read, in which order, and what is no document."""

import json

import pytest

from megatron_hybrid.data.documents import BATCH_BYTES, ReadOptions, find_files, iterate_batches, parse_batch
from megatron_hybrid.data.errors import DataError


def texts(inputs, options=ReadOptions(), **how):  # noqa: B008 (frozen)
    batches = iterate_batches(find_files(inputs, **how))
    return [text for batch in batches for _, text in parse_batch(batch, options)]


@pytest.fixture
def tree(tmp_path):
    for name in ["b.py", "a.py", "B/z.py", "B/test/t.py", "B.py", "c.txt", "é.py", "test/u.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    return tmp_path


def test_a_folder_is_sorted_by_path(tree):
    expected = ["B.py", "B/test/t.py", "B/z.py", "a.py", "b.py", "test/u.py", "é.py"]
    assert texts([tree], include=["*.py"]) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.txt"], [], ["c.txt"]),
        (["B/*"], [], ["B/test/t.py", "B/z.py"]),
        (["*.py"], ["test/*", "é.py"], ["B.py", "B/test/t.py", "B/z.py", "a.py", "b.py"]),
        (["*.py"], ["*test/*", "[Bé]*"], ["a.py", "b.py"]),
    ],
)
def test_patterns(tree, include, exclude, expected):
    assert texts([tree], include=include, exclude=exclude) == expected


def test_inputs_keep_their_order(tree):
    assert texts([tree / "c.txt", tree / "a.py"]) == ["c.txt", "a.py"]


@pytest.mark.parametrize(
    ("name", "kind", "lines"),
    [
        ("a.jsonl", "auto", True),
        ("a.json", "auto", True),
        ("a.ndjson", "auto", True),
        ("a.json.gz", "auto", True),
        ("a.jsonl.zst", "auto", True),
        ("a.txt", "auto", False),
        ("a.txt.gz", "auto", False),
        ("a.jsonl", "text", False),
        ("a.txt", "jsonl", True),
    ],
)
def test_kind_by_name(tmp_path, name, kind, lines):
    (tmp_path / name).touch()
    assert find_files([tmp_path / name], kind=kind)[0].lines is lines


@pytest.mark.parametrize(
    ("inputs", "how", "message"),
    [
        (["nothing"], {}, "nothing: no such file or folder"),
        (["."], {}, "is a folder: select files"),
        (["."], {"include": ["*.rs"]}, r"no file matches \*.rs"),
        (["."], {"include": ["*.py"], "exclude": ["*"]}, r"no file matches \*.py and is not excluded"),
        ([], {}, "no input"),
    ],
)
def test_wrong_inputs(tree, inputs, how, message):
    with pytest.raises(DataError, match=message):
        find_files([tree / name for name in inputs], **how)


def test_lines_are_numbered_across_batches(tmp_path):
    file = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 1000})
    count = 3 * BATCH_BYTES // len(line)
    file.write_text("\n".join([line] * count) + '\n\n{"text": "last"}')
    batches = list(iterate_batches(find_files([file])))
    assert len(batches) > 2 and max(sum(map(len, batch.lines)) for batch in batches) < BATCH_BYTES + len(line) + 1
    assert batches[-1].consumed == file.stat().st_size
    assert [batch.consumed for batch in batches] == sorted(batch.consumed for batch in batches)
    wheres = [where for batch in batches for where, _ in parse_batch(batch, ReadOptions())]
    assert wheres[0] == f"{file}:1" and wheres[-1] == f"{file}:{count + 2}" and len(wheres) == count + 1


def test_json_texts(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"body": "caf\xc3\xa9"}\r\n  \n{"body": "\\ud83d\\ude42", "text": 3}\n{"body": ""}')
    assert texts([file], ReadOptions(json_key="body")) == ["café", "🙂", ""]


BAD_LINES = [
    (b'{"text": "a"', "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'{"text": 1}', "member 'text' is a int, not a string"),
    (b'{"text": null}', "member 'text' is a NoneType, not a string"),
    (b'{"body": "", "id": 1}', r"no member 'text' \(it has: 'body', 'id'\); name another with --json-key"),
    (b"{}", r"no member 'text' \(it has: none\)"),
    (b'["a"]', "a JSON object is needed, this is a list"),
    (b'{"text": "\xff"}', "byte 11: not UTF-8"),
    (b'{"text": "ab\\ud800"}', "character 2 of 'text' is half a surrogate pair"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_are_named(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"a.jsonl:3: {message}"):
        texts([file])


def test_text_that_is_not_utf8(tmp_path):
    bad, half = tmp_path / "bad.txt", tmp_path / "half.jsonl"
    bad.write_bytes(b"ab\xffc")
    half.write_text('{"text": "a\\udc00b"}')
    with pytest.raises(DataError, match="bad.txt: byte 2: not UTF-8"):
        texts([bad])
    assert texts([bad, half], ReadOptions(bad_utf8="skip")) == [None, None]
    assert texts([bad, half], ReadOptions(bad_utf8="replace")) == ["ab\ufffdc", "a\ufffdb"]


def test_an_empty_jsonl_file(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(DataError, match="a.jsonl: empty"):
        texts([tmp_path / "a.jsonl"])
