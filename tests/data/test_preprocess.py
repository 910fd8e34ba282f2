"""Documents to .bin/.idx: what is written, that workers do not change it, and that failures leave nothing."""

import gzip
import hashlib
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_hybrid.config.data import SourceConfig
from megatron_hybrid.data import documents
from megatron_hybrid.data.documents import ReadOptions
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.preprocess import preprocess
from megatron_hybrid.data.sources import open_source
from megatron_hybrid.data.tokenizer import ByteTokenizer
from megatron_hybrid.data.validate import validate_source

TEXTS = ["first", "", "zweites — 漢字 🙂", "third\nwith lines\n"] + [f"document {i} " * (i % 7) for i in range(40)]
KEPT = [text for text in TEXTS if text]


def read_with_megatron(prefix) -> list[list[int]]:
    """The documents' tokens, through megatron-core's reader."""
    dataset = IndexedDataset(str(prefix))  # must outlive the arrays: it unmaps them when it goes
    return [sequence.tolist() for sequence in dataset[:]]


def decoded(prefix) -> list[str]:
    """The documents of a byte-level dataset."""
    sequences = read_with_megatron(prefix)
    assert all(sequence[-1] == 256 and 256 not in sequence[:-1] for sequence in sequences)
    return [ByteTokenizer().decode(sequence) for sequence in sequences]


@pytest.fixture
def jsonl(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(TEXTS)))
    return file


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(documents, "BATCH_BYTES", 200)
    monkeypatch.setattr(documents, "BATCH_FILES", 3)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(tmp_path, jsonl, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    file = tmp_path / f"packed.jsonl{suffix}"
    file.write_bytes(pack(jsonl.read_bytes()))
    summary = preprocess([file], tmp_path / "out", sha256=True)[str(tmp_path / "out")]
    assert decoded(tmp_path / "out") == KEPT
    assert json.loads((tmp_path / "out.json").read_text()) == asdict(summary)
    assert (summary.documents, summary.empty_documents) == (len(KEPT), len(TEXTS) - len(KEPT))
    assert summary.tokens == sum(len(text.encode()) + 1 for text in KEPT) and summary.max_token == 256
    assert (summary.vocab_size, summary.eos_token_id, summary.dtype) == (257, 256, "uint16")
    assert summary.sha256 == hashlib.sha256((tmp_path / "out.bin").read_bytes()).hexdigest()
    validate_source(open_source(SourceConfig(path=str(tmp_path / "out")), 257), 257)


def test_a_folder_of_source_code(tmp_path, small_batches):
    for i, text in enumerate(TEXTS):
        (tmp_path / "src" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / f"{i % 3}" / f"{i:02}.py").write_bytes(text.encode())
    (tmp_path / "src" / "notes.md").write_text("no")
    preprocess([tmp_path / "src"], tmp_path / "out", include=["*.py"])
    expected = [text for part in range(3) for i, text in enumerate(TEXTS) if i % 3 == part and text]
    assert decoded(tmp_path / "out") == expected


def outputs(folder, prefix) -> dict[str, bytes]:
    return {file.name.removeprefix(prefix): file.read_bytes() for file in folder.glob(f"{prefix}*")}


@pytest.mark.parametrize("split", [None, {"train": 0.7, "validation": 0.3}])
def test_output_does_not_depend_on_workers_or_batches(tmp_path, jsonl, monkeypatch, split):
    text = tmp_path / "a.txt"
    text.write_text("a text between")
    inputs = [jsonl, text, jsonl]
    preprocess(inputs, tmp_path / "one", split=split)
    monkeypatch.setattr(documents, "BATCH_BYTES", 200)
    for name, workers in [("small", 1), ("three", 3)]:
        preprocess(inputs, tmp_path / name, split=split, workers=workers)
        assert outputs(tmp_path, name) == outputs(tmp_path, "one")
    assert len(outputs(tmp_path, "one")) == (3 if split is None else 6)


def test_split_is_a_partition_that_does_not_move(tmp_path, jsonl):
    preprocess([jsonl], tmp_path / "out", split={"a": 0.5, "b": 0.3, "c": 0.2})
    parts = {name: decoded(tmp_path / f"out_{name}") for name in "abc"}
    assert sorted(sum(parts.values(), [])) == sorted(KEPT)
    for part in parts.values():
        assert [text for text in KEPT if text in set(part)] == part  # in the order of the input
    with jsonl.open("a") as file:
        file.write('{"text": "one more"}\n')
    preprocess([jsonl], tmp_path / "more", split={"a": 0.5, "b": 0.3, "c": 0.2})
    for name in "abc":
        assert decoded(tmp_path / f"more_{name}")[: len(parts[name])] == parts[name]


def test_split_shares(tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "x"}\n' * 20_000)
    summaries = preprocess([file], tmp_path / "out", split={"train": 0.99, "validation": 0.01})
    assert [summary.documents for summary in summaries.values()] == pytest.approx([19_800, 200], abs=5 * 14)


def test_a_large_vocabulary_is_int32(tmp_path, jsonl):
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)} | {"<s>": 70_000}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    file = tmp_path / "in.txt"
    file.write_text("w1 w69999 what")
    summary = preprocess([file], tmp_path / "out", tokenizer=str(folder))[str(tmp_path / "out")]
    assert read_with_megatron(tmp_path / "out") == [[1, 69_999, 0, 70_000]]
    assert (summary.dtype, summary.max_token, summary.vocab_size) == ("int32", 70_000, 70_001)


def test_a_trained_tokenizer_in_workers(tmp_path, jsonl):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(KEPT, trainer)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    preprocess([jsonl], tmp_path / "out", tokenizer=str(folder), workers=2, append_eos=False)
    assert read_with_megatron(tmp_path / "out") == [backend.encode(text).ids for text in KEPT]


def test_progress_reaches_the_end(tmp_path, jsonl, small_batches):
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    seen = []
    preprocess([jsonl, packed], tmp_path / "out", progress=lambda *both: seen.append(both))
    total = jsonl.stat().st_size + packed.stat().st_size
    assert len(seen) > 3 and seen == sorted(seen) and seen[-1] == (total, total)


def bad_utf8(file):
    file.write_bytes(file.read_bytes() + b'{"text": "\xff"}\n')


def broken_json(file):
    file.write_bytes(file.read_bytes() + b'{"text": "')


def no_key(file):
    file.write_bytes(file.read_bytes() + b'{"body": ""}\n')


def truncated(file):
    file.rename(file.with_name("plain"))
    packed = gzip.compress(file.with_name("plain").read_bytes())
    file.with_name("in.jsonl.gz").write_bytes(packed[:-20])


def empty(file):
    file.write_bytes(b"")


def only_empty_documents(file):
    file.write_bytes(b'{"text": ""}\n' * 3)


LAST = len(TEXTS) + 1


@pytest.mark.parametrize(
    ("damage", "message", "workers"),
    [
        (bad_utf8, f"in.jsonl:{LAST}: byte 11: not UTF-8", 1),
        (broken_json, f"in.jsonl:{LAST}: broken JSON", 1),
        (broken_json, f"in.jsonl:{LAST}: broken JSON", 2),  # in a worker
        (no_key, f"in.jsonl:{LAST}: no member 'text'", 1),
        (truncated, r"in.jsonl.gz: truncated at byte \d+", 1),
        (truncated, r"in.jsonl.gz: truncated at byte \d+", 2),  # here, while workers work
        (empty, "in.jsonl: empty", 1),
        (only_empty_documents, "in.jsonl: 3 documents, and no text in them", 1),
    ],
)
def test_failures_leave_what_was_there(tmp_path, jsonl, small_batches, damage, message, workers):
    out = tmp_path / "out"
    preprocess([jsonl], out / "old")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert len(before) == 3
    damage(jsonl)
    source = next(tmp_path.glob("in.jsonl*"))
    for prefix in ("new", "old"):
        with pytest.raises(DataError, match=message):
            preprocess([source], out / prefix, workers=workers, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_an_existing_dataset_is_kept(tmp_path, jsonl):
    preprocess([jsonl], tmp_path / "out")
    before = outputs(tmp_path, "out")
    with pytest.raises(DataError, match="out.bin exists: give another output prefix, or --overwrite"):
        preprocess([jsonl], tmp_path / "out")
    assert outputs(tmp_path, "out") == before
    preprocess([jsonl, jsonl], tmp_path / "out", overwrite=True)
    assert decoded(tmp_path / "out") == KEPT * 2


def test_a_split_without_documents(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one document")
    with pytest.raises(DataError, match="none of 1 documents fell to it: give it a larger share"):
        preprocess([file], tmp_path / "out", split={"train": 0.5, "validation": 0.5})
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"workers": 0}, "workers = 0: at least 1"),
        ({"split": {"a": 0.5, "b": 0.4}}, "split 0.5,0.4: shares must be positive and add up to 1"),
        ({"split": {"a": 1.5, "b": -0.5}}, "must be positive"),
        ({"tokenizer": "gpt2"}, "never downloaded"),
    ],
)
def test_wrong_arguments(tmp_path, jsonl, how, message):
    with pytest.raises(ValueError, match=message):
        preprocess([jsonl], tmp_path / "out", **how)
    assert list(tmp_path.iterdir()) == [jsonl]


def test_documents_that_are_not_utf8_can_be_left_out(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_bytes(b"good")
    options = ReadOptions(bad_utf8="skip")
    summary = preprocess([tmp_path], tmp_path / "out", include=["*.txt"], options=options)[str(tmp_path / "out")]
    assert decoded(tmp_path / "out") == ["good"] and summary.skipped_documents == 1


def run_tool(root, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "tools" / "preprocess_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(root)}, timeout=60)


def test_the_command(tmp_path, jsonl, root):
    out = tmp_path / "out"
    done = run_tool(
        root, jsonl, "--output", out, "--split", "0.5,0.5", "--split-names", "a,b", "--workers", 2, "--sha256"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(decoded(f"{out}_a") + decoded(f"{out}_b")) == sorted(KEPT)
    assert f"{out}_a: " in done.stdout and "MB" in done.stderr or "kB" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.jsonl"], "preprocess_data: nothing.jsonl: no such file or folder"),
        (["IN", "--split", "0.5"], "1 shares for the names train,validation"),
        (["IN", "--split", "a,b"], "numbers with commas between"),
        (["IN", "--json-key", "body"], "in.jsonl:1: no member 'body'"),
    ],
)
def test_the_command_fails_in_one_line(tmp_path, jsonl, root, arguments, message):
    done = run_tool(root, *[str(jsonl) if a == "IN" else a for a in arguments], "--output", tmp_path / "out")
    assert done.returncode == 78
    assert message in done.stderr and "Traceback" not in done.stderr
