"""Hostile and damaged files give a typed error quickly, and nothing is written."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.checkpoint.safetensors_header import read_header
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.hf.reader import open_huggingface
from tests.convert.folders import BASE, write_folder
from tests.convert.test_huggingface import to_ours, to_theirs

ROOT = Path(__file__).resolve().parents[2]


def safetensors(header: bytes | dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = json.dumps(entry(0, 4, [1])).encode()
DAMAGED = {
    "empty file": b"",
    "three bytes": b"abc",
    "header longer than the file": safetensors({"a": entry(0, 4, [1])}, bytes(4), length=1 << 20),
    "header of 2^63 bytes": safetensors(b"{}", length=1 << 63),
    "not JSON": safetensors(b"{nonsense}"),
    "not UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "a list": safetensors(b"[]"),
    "nested too deep": safetensors(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "a number of 10,000 digits": safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,4]}}', bytes(4)),
    "key twice": safetensors(b'{"a":%s,"a":%s}' % (ONE, ONE), bytes(4)),
    "unknown dtype": safetensors({"a": entry(0, 4, [1], "F31")}, bytes(4)),
    "wrong size": safetensors({"a": entry(0, 4, [2])}, bytes(4)),
    "size overflows": safetensors({"a": entry(0, 4, [1 << 40, 1 << 40, 1 << 40])}, bytes(4)),
    "negative offset": safetensors({"a": entry(-4, 0, [1])}, bytes(4)),
    "behind the end": safetensors({"a": entry(0, 8, [2])}, bytes(4)),
    "overlap": safetensors({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "hole": safetensors({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "bytes left over": safetensors({"a": entry(0, 4, [1])}, bytes(8)),
    "true for a number": safetensors({"a": entry(0, 4, [True])}, bytes(4)),
    "a fraction": safetensors({"a": entry(0, 4, [1.0])}, bytes(4)),
    "metadata is a list": safetensors({"__metadata__": [], "a": entry(0, 4, [1])}, bytes(4)),
    "an extra field": safetensors({"a": entry(0, 4, [1]) | {"x": 1}}, bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_at_once(case, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(DAMAGED[case])
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match="model.safetensors"):
        read_header(folder / "model.safetensors", ConversionError)
    assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
    assert list(tmp_path.iterdir()) == [folder]


def test_what_safetensors_writes_is_read(tmp_path):
    tensors = {
        "a": torch.zeros(3, 5),
        "none": torch.zeros(0, 4),
        "b": torch.ones(7, dtype=torch.bfloat16),
        "scalar": torch.tensor(1.0),
        "flag": torch.tensor([True]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert {n: t.shape for n, t in read_header(tmp_path / "x.safetensors", ConversionError).items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    write_folder(tmp_path / "hf", BASE, shard="6KB")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\0b", "x" * 300]
)
def test_names_that_leave_the_folder(folder, name, capsys):
    shutil.copy(next(folder.glob("model-*")), folder.parent / "secret.safetensors")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    assert to_ours(folder, folder.parent / "ours") == BAD_INPUT
    assert "is not the name of a file" in capsys.readouterr().err
    assert not (folder.parent / "ours").exists()


def test_links_and_pipes(folder, capsys):
    shard = next(folder.glob("model-*"))
    outside = folder.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    assert to_ours(folder, folder.parent / "ours") == BAD_INPUT
    assert "is not followed" in capsys.readouterr().err
    shard.unlink()
    os.mkfifo(shard)  # opening it would wait for ever
    assert to_ours(folder, folder.parent / "ours") == BAD_INPUT
    assert "not a regular file" in capsys.readouterr().err
    shard.unlink()
    shard.symlink_to(shard)
    assert to_ours(folder, folder.parent / "ours") == BAD_INPUT
    assert "no such file" in capsys.readouterr().err
    shard.unlink()
    outside.rename(folder / "inside.safetensors")
    shard.symlink_to("inside.safetensors")
    assert to_ours(folder, folder.parent / "ours") == 0


def test_links_out_of_our_checkpoints(folder, capsys):
    ours = folder.parent / "ours"
    assert to_ours(folder, ours) == 0
    file = next(ours.glob("*.safetensors"))
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")
    assert to_theirs(ours, folder.parent / "export") == BAD_INPUT
    assert "is not followed" in capsys.readouterr().err


def test_pickles_are_refused_with_the_way_out(tmp_path, capsys):
    folder = tmp_path / "hf"
    folder.mkdir()
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
    told = capsys.readouterr().err
    assert "pickle" in told and "save_pretrained" in told


def test_targets_are_never_replaced(folder, capsys):
    target = folder.parent / "ours"
    target.mkdir()
    (target / "precious").write_text("x")
    assert to_ours(folder, target) == BAD_INPUT
    assert "exists" in capsys.readouterr().err
    assert [p.name for p in target.iterdir()] == ["precious"]
    other = folder.parent / ".converting-new"
    other.mkdir()
    (other / "precious").write_text("x")
    assert to_ours(folder, folder.parent / "new") == BAD_INPUT
    assert "in the way" in capsys.readouterr().err
    assert (other / "precious").exists()


def test_an_interrupted_conversion_resumes(folder, monkeypatch, capsys):
    from megatron_hybrid.checkpoint.folders import complete_checkpoints, find_checkpoint
    from megatron_hybrid.convert import job
    from tools import convert_to_hf

    ours, target = folder.parent / "ours", folder.parent / "export"
    assert to_ours(folder, ours) == 0
    written = []
    real = job.write_file

    def interrupted(path, *rest):
        if len(written) == 2:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        written.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(job, "write_file", interrupted)
    arguments = [str(ours), str(target), "--quiet", "--max-shard-size", "6KB"]
    assert convert_to_hf.main(arguments) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not target.exists()
    assert not complete_checkpoints(folder.parent)

    again = []
    monkeypatch.setattr(job, "write_file", lambda path, *rest: (again.append(path.name), real(path, *rest))[1])
    assert convert_to_hf.main(arguments) == 0
    assert len(written) == 2 and again and not set(written) & set(again)
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]
    assert not [p for p in target.iterdir() if "done" in p.name or "plan" in p.name]
    monkeypatch.setattr(job, "write_file", real)
    assert convert_to_hf.main([str(ours), str(folder.parent / "whole"), "--quiet", "--max-shard-size", "6KB"]) == 0
    for path in target.iterdir():
        assert path.read_bytes() == (folder.parent / "whole" / path.name).read_bytes()
    assert find_checkpoint(str(ours), "checkpoint.resume") == ours


def test_a_plan_that_cannot_be_read_keeps_the_files_written_so_far(folder, monkeypatch, capsys):
    begun = folder.parent / ".converting-ours"
    begun.mkdir()
    (begun / "plan.json").write_text("{}")
    (begun / "finished").write_text("x")
    read_text = Path.read_text

    def fail(self, *arguments, **options):
        if self.name == "plan.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return read_text(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", fail)
    assert to_ours(folder, folder.parent / "ours") != 0
    assert "Input/output error" in capsys.readouterr().err
    assert (begun / "finished").exists()


def test_a_changed_source_starts_over(folder, monkeypatch):
    from megatron_hybrid.convert import job

    target = folder.parent / "ours"
    real = job.write_file

    def stop(path, *rest):
        real(path, *rest)()
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "write_file", stop)
    assert to_ours(folder, target) == 130
    os.utime(next(folder.glob("model-*")))
    monkeypatch.setattr(job, "write_file", real)
    assert to_ours(folder, target) == 0


def test_what_fails_midway_leaves_nothing(folder, monkeypatch, capsys):
    from megatron_hybrid.convert import job

    def broken(path, *rest):
        path.write_bytes(b"x")
        raise ConversionError("the source changed")

    monkeypatch.setattr(job, "write_file", broken)
    assert to_ours(folder, folder.parent / "ours") == BAD_INPUT
    assert [p.name for p in folder.parent.iterdir()] == ["hf"]


@pytest.mark.slow
def test_fuzzing(tmp_path):
    """2,000 damaged files, headers and indices of both formats: refused or harmless, in bounded time and memory."""
    small = BASE | dict(layer_pattern="GA", vocab_size=11)
    write_folder(tmp_path / "hf", small, shard="6KB")
    for path in (tmp_path / "hf").glob("generation*"):
        path.unlink()
    assert to_ours(tmp_path / "hf", tmp_path / "ours") == 0
    (tmp_path / "ours/model.yaml").unlink()
    command = [sys.executable, "-m", "tests.convert.fuzz", str(tmp_path), "20260101", "2000", "150"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["done"] == 2000, report
    assert report["refused"] > 1200 and report["converted"] > 20, report
    assert report["strange"] == [], report
    assert report["slowest"] < 10 and report["grown_kib"] < 300_000, report


def test_planning_reads_headers_alone(folder):
    assert open_huggingface(folder).sources.keys() >= {"embedding.weight", "output.weight"}


def test_a_source_that_changes_meanwhile_is_noticed(folder, monkeypatch, capsys):
    from megatron_hybrid.convert import job

    real = job.write_file

    def changing(path, *rest):
        os.utime(next(folder.glob("model-*")))
        return real(path, *rest)

    monkeypatch.setattr(job, "write_file", changing)
    assert to_ours(folder, folder.parent / "ours") == BAD_INPUT
    assert "changed meanwhile" in capsys.readouterr().err
    assert [p.name for p in folder.parent.iterdir()] == ["hf"]
