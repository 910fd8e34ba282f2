"""Runs on generated samples: the same on every number of ranks, and resumed bit for bit through an early stage of the curriculum."""

import json

import pytest
import torch

from testing import jobs
from testing.models import SMALLEST
from tests.train.curriculum_jobs import in_one_and_in_two_starts

TASK = {"task": "state_tracking", "variables": 3, "gap": 1}


def config(folder) -> dict:
    """Stages end early at step 4, by accuracy, and at step 8, by samples."""
    return dict(
        run_dir=str(folder / "whole"),
        model=SMALLEST,
        data=dict(
            train=[{"generator": TASK | {"size": 2}}],
            validation={"n2": [{"generator": TASK | {"size": 2, "labels": "last"}}]},
            sequence_length=192,
            curriculum=[
                {"size": 2, "samples": 800, "accuracy": 1 / 64, "validation": "n2"},
                {"size": 8, "samples": 32},
                {"size": 12},
            ],
        ),
        train=dict(
            steps=10,
            global_batch_size=8,
            micro_batch_size=4,
            dtype="fp32",
            eval_interval=4,
            eval_batches=8,
            eval_accuracy=True,
            optimizer=dict(lr=1e-2),
            schedule=dict(kind="constant"),
        ),
        checkpoint=dict(interval=6),
        logging=dict(plot_interval=0, tensorboard=False),
    )


def lines(path) -> list[dict]:
    timing = ("seconds", "time", "tokens_per_s", "tflops", "memory_gb", "goodput", "goodput_tokens_per_s")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in timing} for record in records]


@pytest.fixture(scope="module")
def resumed(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (results,) = ranks.run(in_one_and_in_two_starts, 1, config=config(folder), stopped_at=6)
    return folder, *results


def test_a_resumed_run_continues_its_curriculum(resumed):
    folder, whole, again = resumed
    assert whole["progress"] == again["progress"]
    assert whole["progress"]["tokens"] == 8 * (4 * 64 + 4 * 128 + 2 * 192), "lengths of the stages"
    expected, found = (lines(folder / name / "metrics.jsonl") for name in ("whole", "stopped"))
    found[5] = {key: value for key, value in found[5].items() if not key.startswith("eval")}  # its last step at first
    assert found == expected
    for kind in ("parameters", "moments"):
        assert all(torch.equal(whole[kind][name], again[kind][name]) for name in whole[kind])


def test_two_ranks_train_on_the_same_samples(resumed, ranks, tmp_path):
    folder, *_ = resumed
    ranks.run(jobs.pretrain_run, 2, config=config(tmp_path))
    one, two = lines(folder / "whole" / "metrics.jsonl"), lines(tmp_path / "whole" / "metrics.jsonl")
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)
    accuracies = [[line["eval/n2/accuracy"] for line in run if "eval/n2/accuracy" in line] for run in (one, two)]
    assert accuracies[0] == accuracies[1] and len(accuracies[0]) == 3
    assert all(value * 64 == round(value * 64) for value in accuracies[0]), "of 64 samples"
