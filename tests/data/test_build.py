"""From a DataConfig to blends, and torch stays out until batches are made."""

import json
import subprocess
import sys

import numpy as np
import pytest

from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.data.build import build_train_and_validation
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.data.loader import BatchLoader
from tests.data.files import write_indexed, write_raw


@pytest.fixture
def paths(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 257, size).tolist() for size in random.integers(5, 50, 40)]
    prefix = write_indexed(tmp_path / "indexed", documents)
    shards = [write_raw(tmp_path / f"raw{i}.npy", random.integers(0, 257, 333)) for i in range(3)]
    return {"indexed": prefix, "raw": str(tmp_path / "raw*.npy"), "shard": shards[0]}


def config(paths, **more) -> DataConfig:
    train = ({"path": paths["indexed"], "weight": 3}, {"path": paths["raw"], "weight": 1})
    return DataConfig(**({"train": train, "sequence_length": 16} | more))


def test_train_and_validation(tmp_path, paths):
    train, validation = build_train_and_validation(
        config(paths, validation=({"path": paths["shard"]},)), 257, tmp_path / "run"
    )
    assert train.shares == (0.75, 0.25) and [d.source.name for d in train.datasets] == [paths["indexed"], paths["raw"]]
    assert train.sample(0).shape == validation[""].sample(0).shape == (17,)
    verdicts = json.loads((tmp_path / "run" / "validated_data.json").read_text())
    assert len(verdicts) == 5  # .idx, .bin, three shards; the shard that validation shares is looked at once
    assert build_train_and_validation(config(paths), 257)[1] == {}


def test_the_order_follows_the_seed_alone(paths):
    def read(**more):
        train, _ = build_train_and_validation(config(paths, **more), 257)
        return np.stack([train.sample(i) for i in range(50)])

    assert (read() == read()).all() and (read(num_workers=4) == read()).all()
    assert not (read(seed=1) == read()).all()


def test_through_the_loader(paths):
    """Two ranks with small micro-batches read what one rank with a large one reads, from real files."""
    train, _ = build_train_and_validation(config(paths), 257)
    (whole,) = BatchLoader(train, 8).global_batch(24, 8)
    halves = [BatchLoader(train, 2, data_parallel_rank=r, data_parallel_size=2).global_batch(24, 8) for r in range(2)]
    rows = [row for step in zip(*halves, strict=True) for part in step for row in part.tokens.tolist()]
    assert rows == whole.tokens.tolist()


def test_bad_data_is_found_before_training(tmp_path, paths):
    with pytest.raises(DataError, match=r"indexed.bin: byte \d+: token 256 .* outside the vocabulary of 256"):
        build_train_and_validation(config(paths), 256)
    build_train_and_validation(config(paths), 256, validate=False)
    with pytest.raises(DataError, match="no such file"):
        build_train_and_validation(config(paths, validation=({"path": str(tmp_path / "no")},)), 257)
    with pytest.raises(DataError, match="do not make one sample"):
        build_train_and_validation(config(paths, sequence_length=5000), 257)


def test_only_batches_need_torch(root):
    modules = ["build", "preprocess", "tokenizer"]
    code = ";".join(f"import megatron_hybrid.data.{name}" for name in modules)
    code += ";import sys; assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root)}, timeout=60)
