"""Hostile and damaged checkpoints of OLMo-core are refused, and no pickle is run."""

import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.convert.errors import ConversionError
from megatron_hybrid.convert.olmo_core.importer import from_olmo_core
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
