"""Hostile files of every format give a typed error within the bounds of testing/bounded.py."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import pickle
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.arch.tensor_slice import TensorSlice
from megatron_hybrid.base import yaml_text
from megatron_hybrid.checkpoint.format import CheckpointError
from megatron_hybrid.checkpoint.index_file import read_index
from megatron_hybrid.checkpoint.safetensors_header import MAX_HEADER_BYTES, read_header
from megatron_hybrid.convert.hf.reader import open_huggingface
from megatron_hybrid.convert.olmo_core.saved_tensor import SavedSlice, locate_values
from megatron_hybrid.convert.olmo_core.torch_checkpoint import METADATA, TorchCheckpoint
from megatron_hybrid.data.boundaries import find_boundaries
from megatron_hybrid.data.documents import find_files, iterate_batches, parse_batch
from megatron_hybrid.data.hf_tokenizer import _read_files
from megatron_hybrid.data.indexed import MAGIC
from megatron_hybrid.data.indexed import read_index as read_token_index
from megatron_hybrid.data.raw_tokens import raw_dtype
from megatron_hybrid.data.records import ReadOptions
from megatron_hybrid.data.sources import Shard
from testing import bounded
from testing.bounded import outcome, refused


def test_the_limits_are_in_force(monkeypatch):
    assert "MemoryError" in outcome(lambda: bytearray(400 << 20))
    monkeypatch.setattr(bounded, "CPU_SECONDS", 1)
    assert outcome(lambda: all(itertools.repeat(1))) == f"ended with status {-signal.SIGKILL}"


MERGES = "x0: &x0 {a: 1}\n" + "".join(f"x{i}: &x{i} {{<<: [{','.join([f'*x{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
YAML = {
    "merge keys": MERGES,
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
    "a value in itself": "a: &a {b: *a}\n",
    "spaces": "a: 1\n" + " " * 50_000_000,
    "keys": "".join(f"k{i}: 1\n" for i in range(60_000)),
    "long list": "a: [" + "1," * 250_000 + "]",
    "brackets": "[" * 500_000,
    "braces": "{a: " * 100_000,
    "dashes": "- " * 250_000,
    "questions": "? " * 250_000,
    "digits": "a: " + "9" * 4000,
    "more digits": "a: " + "9" * 400_000,
}


@pytest.mark.parametrize("case", YAML)
def test_yaml(case, tmp_path):
    (tmp_path / "run.yaml").write_text(YAML[case])
    refused(lambda: yaml_text.read_file(tmp_path / "run.yaml", "run.yaml"))


AT_THE_LIMIT = {
    "words": "a: " + "x " * 250_000,
    "lines": "a: |\n" + "  x\n" * 125_000,
    "comment": "#" * 500_000,
    "empty lines": "\n" * 500_000,
}


@pytest.mark.parametrize("case", AT_THE_LIMIT)
def test_yaml_at_the_limit_of_size_is_read(case):
    assert outcome(lambda: yaml_text.read(AT_THE_LIMIT[case], "run.yaml")) == "no error"


def index_of(**parts: object) -> bytes:
    whole = dict(format="megatron_hybrid/1", model={}, run={}, state={}, files={}, tensors={}) | parts
    return json.dumps(whole).encode()


SHARD = dict(file="rank-00000.safetensors", entry="x", offset=[0], shape=[1 << 60], range=None)
INDEXES = {
    "lists": b'{"format":' + b"[" + b"[]," * 8_000_000 + b"[]]}",
    "numbers": index_of(state={"a": list(range(1_200_000))}).replace(b" ", b"") + b" " * 20_000_000 + b"x",
    "nested": b'{"format":' + b"[" * 1_000_000,
    "digits": b'{"format":' + b"9" * 3_000_000 + b"}",
    "keys twice": b'{"format":1,' + b",".join(b'"%d":1' % i for i in range(400_000)) + b',"399999":1}',
    "huge": b" " * (40 << 20),
    "huge shape": index_of(
        tensors={"a": dict(dtype="F32", shape=[1 << 60], shards=[SHARD | dict(range=[0, 1 << 60])])}
    ),
    "many slices": index_of(
        tensors={"a": dict(dtype="F32", shape=[1], shards=[dict(SHARD, shape=[1]) for _ in range(79_000)])}
    ),
    "more slices than are read": index_of(
        tensors={"a": dict(dtype="F32", shape=[1], shards=[dict(SHARD, shape=[1]) for _ in range(150_000)])}
    ),
    "file outside": index_of(files={"../x.safetensors": {"bytes": 1, "sha256": ""}}),
    "device": index_of(other_files={"/dev/zero": {"bytes": 1, "sha256": ""}}),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_of_a_checkpoint(case, tmp_path):
    (tmp_path / "index.json").write_bytes(INDEXES[case])
    refused(lambda: read_index(tmp_path))


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HEADERS = {
    "spaces": header(b"{}" + b" " * (16 << 20)),
    "tensors": header(
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(240_000)) + b"}"
    ),
    "nested": header(b'{"a":' + b"[" * 1_000_000),
    "numbers": header(b'{"a":{"dtype":"F32","shape":[' + b"1," * 3_000_000 + b'1],"data_offsets":[0,4]}}') + bytes(4),
    "digits": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 4_000_000 + b'],"data_offsets":[0,4]}}') + bytes(4),
    "longer than the file": struct.pack("<Q", MAX_HEADER_BYTES - 1) + b"{}",
}


@pytest.mark.parametrize("case", HEADERS)
def test_header_of_safetensors(case, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(HEADERS[case])
    refused(lambda: read_header(tmp_path / "x.safetensors", CheckpointError))


@pytest.mark.parametrize(
    "config",
    [
        b'{"a":' + b"[" * 500_000,
        b'{"model_type":"olmo3","num_hidden_layers":' + b"9" * 500_000 + b"}",
        b'{"model_type":"olmo3","layer_types":[' + b'"a",' * 200_000 + b'"a"]}',
        b" " * (2 << 20),
        b'{"model_type":"olmo3","num_hidden_layers":1000000000}',
    ],
    ids=["nested", "digits", "layers", "large", "deep"],
)
def test_config_of_hugging_face(config, tmp_path):
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").write_bytes(header(b"{}"))
    refused(lambda: open_huggingface(tmp_path))


def pickled_tuple(depth: int) -> bytes:
    """Return opcodes that push a tuple which holds the one before it twice, `depth` levels deep."""
    return b")" + b"2\x86" * depth


TORCH_METADATA = "torch.distributed.checkpoint.metadata"
SIZE = b"h\x08K\x01M\x00\x0f\x86\x94\x85\x94R\x94"


def pickled_slices(count: int) -> bytes:
    """Return opcodes of a list of slices as torch pickles them. The list is open."""
    texts = ("", TORCH_METADATA, "ChunkStorageMetadata", "offsets", "sizes", "torch", "Size")
    named = b"".join(b"\x8c%c%b\x94" % (len(text), text.encode()) for text in texts)
    classes = b"h\x01h\x02\x93\x94" + b"h\x05h\x06\x93\x94"  # memo entries 7 and 8
    return (
        b"\x80\x04(" + named + classes + (b"h\x07)\x81\x94}\x94(h\x03" + SIZE + b"h\x04" + SIZE + b"ub") * count + b"0"
    )


PICKLES = {
    "tuples, hashed": b"\x80\x04}" + pickled_tuple(40) + b"K\x01s.",
    "tuples": b"\x80\x04" + pickled_tuple(40) + b".",
    "lists": b"\x80\x04" + b"](" + b"]" * 5_000_000 + b"e.",
    "lists that hold each other twice": b"\x80\x04]\x94"
    + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(40))
    + b".",
    "a mark popped": b"\x80\x04" + pickled_tuple(40).replace(b"2", b"K\x01(02") + b".",
    "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
    "bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 34) + b".",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 34) + b".",
    "large": b"\x80\x04" + b"N0" * (40 << 20),
    "many opcodes": b"\x80\x04" + b"N0" * (15 << 20),
    "more slices than are read": pickled_slices(700_000),
    "a number": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".",
}
BOMBS = {
    "tuples, hashed": b"}" + pickled_tuple(40) + b"K\x01s",
    "memo": b"r\xff\xff\xff\x7f",
    "lists": b"]" * (1 << 23),
    "opcodes": b"N0" * 600_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_at_the_end_of_the_metadata(bomb, tmp_path):
    (tmp_path / METADATA).write_bytes(pickled_slices(395_000) + BOMBS[bomb] + b".")
    refused(lambda: TorchCheckpoint(tmp_path))


def test_a_bomb_inside_a_slice(tmp_path):
    for key in (b"j\xff\xff\xff\x7f", b"hZ"):
        bomb = pickled_tuple(40) + b"\x94" * 200 + b"h\x07)\x81\x94}\x94(" + key + SIZE + b"ub"
        (tmp_path / METADATA).write_bytes(pickled_slices(1000) + bomb + b".")
        refused(lambda: TorchCheckpoint(tmp_path))


@pytest.mark.parametrize("case", PICKLES)
def test_metadata_of_olmo_core(case, tmp_path):
    (tmp_path / METADATA).write_bytes(PICKLES[case])
    refused(lambda: TorchCheckpoint(tmp_path))


def archive(path: Path, members: dict[str, bytes], compression: int) -> SavedSlice:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)
    return SavedSlice(TensorSlice((0,), (1,)), path, 0, path.stat().st_size)


@pytest.mark.parametrize("name", ["byteorder", "data.pkl"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_zip_bombs(name, compression, tmp_path):
    bomb = bytes((1 << 20) if compression == zipfile.ZIP_STORED else (320 << 20))
    members = {"data.pkl": pickle.dumps(1), "data/0": bytes(4)} | {name: bomb}
    saved = archive(tmp_path / "x", members, compression)
    refused(lambda: locate_values("a", "F32", saved))


def test_a_zip_with_many_members(tmp_path):
    saved = archive(tmp_path / "x", {f"m{i}": b"" for i in range(40_000)}, zipfile.ZIP_STORED)
    refused(lambda: locate_values("a", "F32", saved))


@pytest.mark.parametrize("text", [b"0" * (320 << 20), b"0,0\n" * (30 << 20)], ids=["a line", "lines"])
def test_metadata_of_documents(text, tmp_path):
    np.zeros(1000, "<u2").tofile(tmp_path / "a.npy")
    with gzip.open(tmp_path / "a.csv.gz", "wb", compresslevel=1) as file:
        file.write(text)
    refused(lambda: find_boundaries(Shard(str(tmp_path / "a.npy"), np.dtype("<u2"), 0, 1000), None))


def compressed_bomb(path: Path, codec: str, head: bytes, mebibytes: int = 320) -> None:
    """Write a file of a few MiB at most that expands to `head` and zeros."""
    chunk = bytes(1 << 20)
    if codec == "gz":
        compressor = zlib.compressobj(1, wbits=31)
        one = compressor.compress(head) + b"".join(compressor.compress(chunk) for _ in range(mebibytes))
        path.write_bytes(one + compressor.flush())
    elif codec == "zst":
        rle = struct.pack("<I", (128 << 10) << 3 | 2)[:3] + b"0"  # a block of 128 KiB in 4 bytes
        raw = struct.pack("<I", len(head) << 3)[:3] + head
        last = struct.pack("<I", 1 | 1 << 3 | 2)[:3] + b"0"
        path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x58" + raw + rle * (8 * mebibytes) + last)
    else:
        module = {"bz2": bz2, "xz": lzma}[codec]
        path.write_bytes(module.compress(head + bytes(40 << 20), *(() if codec == "bz2" else (lzma.FORMAT_XZ, -1, 0))))


@pytest.mark.parametrize("codec", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_compressed_corpora(kind, codec, tmp_path):
    file = tmp_path / f"a.{'jsonl' if kind == 'jsonl' else 'txt'}.{codec}"
    compressed_bomb(file, codec, b'{"text": "' if kind == "jsonl" else b"text ")
    assert file.stat().st_size < 10 << 20
    refused(lambda: read_corpus(file))


def read_corpus(file: Path) -> list[str | None]:
    return [text for batch in iterate_batches(find_files([file])) for _, text in parse_batch(batch, ReadOptions())]


LINES = {
    "endless": b'{"text": "' + b"x" * (64 << 20),
    "lists": b'{"text": "a", "b": [' + b"[]," * 8_000_000 + b"1]}",
    "numbers": b'{"text": "a", "b": [' + b"1," * 15_000_000 + b"1]}",
    "keys": b'{"text": "a"' + b"".join(b',"%d":1' % i for i in range(2_000_000)) + b"}",
    "nested": b'{"text": ' + b"[" * 20_000_000,
    "digits": b'{"text": ' + b"9" * 20_000_000 + b"}",
    "objects in a list": b'{"text": "a", "b": [' + b'{"":{}},' * 1_500_000 + b"1]}",
}


@pytest.mark.parametrize("case", LINES)
def test_json_lines(case, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES[case] + b"\n")
    refused(lambda: read_corpus(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("counts", [(1 << 60, 1 << 60), (1 << 40, 2), (2, 1 << 62), ((1 << 64) - 1, 1)])
def test_index_of_tokens(counts, tmp_path):
    (tmp_path / "a.idx").write_bytes(MAGIC + struct.pack("<QBQQ", 1, 8, *counts) + bytes(100))
    refused(lambda: read_token_index(tmp_path / "a.idx"))


def test_header_of_numpy(tmp_path):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", (1 << 32) - 1))
    os.truncate(path, 5 << 30)  # sparse
    refused(lambda: raw_dtype(str(path), None, 1000))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":' + b"[" * 1_000_000,
        b" " * (130 << 20),
        b'{"a":[' + b"[]," * 20_000_000 + b"1]}",
        b'{"a":' + b"9" * 5_000_000 + b"}",
    ],
    ids=["nested", "large", "lists", "digits"],
)
def test_files_of_a_tokenizer(text, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(text)
    refused(lambda: _read_files(tmp_path))
