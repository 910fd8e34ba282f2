"""The ranks of a run check its data together, and none waits for another in a collective."""

import json

import numpy as np
import pytest
import torch.distributed as dist

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.errors import DataError
from megatron_hybrid.train.data_check import open_data
from testing.models import SMALLEST
from tests.data.files import write_raw
from tests.train import data_check_jobs


@pytest.fixture
def config(tmp_path):
    """A run over six pieces of 1,000 tokens (2,000 bytes)."""
    path = write_raw(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 90, 6000))
    return dict(
        run_dir=str(tmp_path / "run"),
        model=SMALLEST,
        data=dict(train=[{"path": path}], sequence_length=16),
        train=dict(steps=1, global_batch_size=2),
    )


def test_every_piece_is_read_once_by_one_rank(ranks, config, tmp_path):
    results = ranks.run(data_check_jobs.check, 2, config=config, all_at_once=True)
    assert [result["error"] for result in results] == [None, None]
    pieces = sorted(piece for result in results for piece in result["read"])
    assert pieces == [("a.npy", start, start + 1000) for start in range(0, 6000, 1000)]
    assert all(result["read"] for result in results), "the work is shared"
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["validated_data.json"]
    assert list(json.loads((tmp_path / "run" / "validated_data.json").read_text())) == [str(tmp_path / "a.npy")]
    again = ranks.run(data_check_jobs.check, 2, config=config)
    assert [result["read"] for result in again] == [[], []]


def test_a_bad_token_is_raised_on_every_rank(ranks, config, tmp_path):
    tokens = np.zeros(6000, int)
    tokens[3500] = 300
    write_raw(tmp_path / "a.npy", tokens)
    results = ranks.run(data_check_jobs.check, 2, config=config)
    for result in results:
        assert "a.npy: byte 7000: token 300" in result["error"]
    assert [r["printed_by"] for r in results].count("each rank") == 1, (
        "the rank that found it, whatever ends the others"
    )


def test_a_file_that_one_rank_misses_is_raised_on_every_rank(ranks, config):
    results = ranks.run(data_check_jobs.check, 2, config=config, missing_on=1)
    assert all("/nowhere/gone.npy" in result["error"] for result in results)


@pytest.fixture
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_documents_are_found_and_packed_before_the_first_step(alone, config, tmp_path, capsys):
    run = RunConfig(**config)
    run = run.model_copy(update={"data": run.data.model_copy(update={"documents": "pack"})})
    with pytest.raises(DataError, match="a.npy: its document boundaries are unknown"):
        open_data(run)
    run = run.model_copy(update={"model": run.model.model_copy(update={"eos_token_id": 0})})
    training, _ = open_data(run)
    printed = capsys.readouterr().out
    assert "documents in 1 files; packed: 6,000 tokens in" in printed and "of the slots filled" in printed
    samples = [training.sample(i) for i in range(training.datasets[0].samples_per_epoch)]
    assert sum(sample.counts.tokens for sample in samples) == 6000
    made = sorted(path.name for path in (tmp_path / "run" / "documents").iterdir())
    again, _ = open_data(run)
    assert (again.sample(3).tokens == samples[3].tokens).all()
    assert sorted(path.name for path in (tmp_path / "run" / "documents").iterdir()) == made
