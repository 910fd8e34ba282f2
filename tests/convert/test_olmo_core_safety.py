"""Hostile and damaged checkpoints of OLMo-core are refused, and no pickle is run."""

import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.olmo_core import pickle_scan
from megatron_hybrid.convert.olmo_core.importer import from_olmo_core
from megatron_hybrid.convert.olmo_core.pickle_records import RecordScanner
from megatron_hybrid.convert.olmo_core.pickle_scan import _Stack, refuse_bombs
from megatron_hybrid.convert.olmo_core.restricted_pickle import METADATA_NAMES, restricted_load
from megatron_hybrid.convert.olmo_core.torch_checkpoint import METADATA, TorchCheckpoint
from tests.convert.folders import BASE
from tests.convert.olmo_core_files import olmo_core_config, olmo_core_state, save, to_ours


class Hostile:
    """An object whose normal unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_in_it_is_refused(tmp_path, capsys):
    model = ModelConfig(**BASE)
    folder = save(tmp_path / "step1", olmo_core_config(model), olmo_core_state(model))
    trap, directory = tmp_path / "trap", folder / "model_and_optim"
    good = (directory / METADATA).read_bytes()
    metadata = pickle.loads(good)  # noqa: S301 - written above
    metadata.planner_data = Hostile(trap)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
    assert "posix.system" in capsys.readouterr().err

    (directory / METADATA).write_bytes(good)
    place = next(iter(metadata.storage_data.values()))
    with zipfile.ZipFile(directory / "evil", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Hostile(trap)))
        archive.writestr("archive/data/0", bytes(4096))
    evil = (directory / "evil").read_bytes()
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = place.relative_path, 0, len(evil)
    metadata.planner_data = None
    (directory / METADATA).write_bytes(pickle.dumps(metadata))
    (directory / place.relative_path).write_bytes(evil)
    assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
    assert "posix.system" in capsys.readouterr().err
    assert not trap.exists() and not (tmp_path / "ours").exists()


def test_metadata_cannot_name_files_outside(tmp_path, capsys):
    model = ModelConfig(**BASE)
    folder = save(tmp_path / "step1", olmo_core_config(model), olmo_core_state(model))
    path = folder / "model_and_optim" / METADATA
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 - written above
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    path.write_bytes(pickle.dumps(metadata))
    assert to_ours(folder, tmp_path / "ours") == BAD_INPUT
    assert "not the name of a file" in capsys.readouterr().err


def test_memo_bombs_are_refused(tmp_path):
    (tmp_path / METADATA).write_bytes(b"\x80\x02]r\xff\xff\xff\x7f.")  # LONG_BINPUT at two thousand million
    with pytest.raises(ConversionError, match="memo index"):
        TorchCheckpoint(tmp_path)


def test_records_are_followed_as_their_opcodes_are(monkeypatch):
    slices = [ChunkStorageMetadata(torch.Size([i, 0]), torch.Size([300, 70_000])) for i in range(0, 90_000, 300)]
    shapes = [torch.Size(range(rank)) for rank in range(6)]
    places = {
        MetadataIndex(f"name {i}", shapes[i % 6] if i % 4 else None, i): _StorageInfo(f"__{i // 9}.distcp", i << 20, i)
        for i in range(2000)
    }
    data = pickle.dumps(Metadata({"a": slices}, slices[3], places), protocol=4)
    found = []
    for skip in (RecordScanner.skip, lambda self, data, at, most: (0, 0, at)):
        stacks = []
        monkeypatch.setattr(RecordScanner, "skip", skip)
        monkeypatch.setattr(
            pickle_scan, "_Stack", lambda where, stacks=stacks: stacks.append(_Stack(where)) or stacks[0]
        )
        refuse_bombs(data, "x")
        found.append((len(stacks[0].sizes), len(stacks[0].memo), stacks[0].marks))
    monkeypatch.undo()
    assert found[0] == found[1] and found[0][1] > 15_000
    assert len(restricted_load(data, METADATA_NAMES, "x").storage_data) == 2000


def test_damaged_metadata_is_refused(tmp_path):
    model = ModelConfig(**BASE | dict(layer_pattern="GA"))
    folder = save(tmp_path / "step1", olmo_core_config(model), olmo_core_state(model))
    path = folder / "model_and_optim" / METADATA
    good, rng = path.read_bytes(), random.Random(7)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data if rng.random() < 0.8 else data[: rng.randrange(len(data))])
        try:
            from_olmo_core(folder, tmp_path / "ours")
        except ConversionError:
            refused += 1
    assert refused > 150
