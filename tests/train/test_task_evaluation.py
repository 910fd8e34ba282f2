"""Downstream tasks during training: the metrics of a run are those of its checkpoint, and layouts without caches are refused."""

import json

import numpy as np
import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.evaluation.stdlib_tasks import write_stdlib_tasks
from testing.models import hybrid
from tests.data.files import write_raw
from tests.train import task_jobs


@pytest.fixture
def config(tmp_path):
    write_stdlib_tasks(tmp_path / "tasks")
    text = b"HTTP status 404 means Not Found. The month after May is June.\n" * 60
    tokens = write_raw(tmp_path / "a.npy", np.frombuffer(text, np.uint8))
    return dict(
        run_dir=str(tmp_path / "run"),
        model=hybrid("GA", 32, 2, 8, vocab_size=257, eos_token_id=256),
        data=dict(train=[{"path": tokens}], sequence_length=128, tokenizer="byte"),
        train=dict(steps=2, global_batch_size=4, micro_batch_size=2, dtype="fp32"),
        checkpoint=dict(interval=2),
        logging=dict(plot_interval=0, tensorboard=False),
        preflight=dict(enabled=False),
        tasks=dict(paths=[str(tmp_path / "tasks")], interval=2, limit=6, batch_size=3),
    )


def test_a_run_evaluates_tasks(ranks, config, tmp_path):
    ranks.run(
        task_jobs.train, 2, config=config | {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {k: v for line in lines for k, v in line.items() if k.startswith("eval/")}
    (expected,) = ranks.run(task_jobs.evaluate, 1, path=config["run_dir"], tasks=config["tasks"]["paths"][0], limit=6)
    assert found == {f"eval/{task}/{metric}": value for task, r in expected.items() for metric, value in r.items()}
    assert found["eval/http_status/documents"] == 6 and len(found) == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(parallel={"pipeline_parallel_size": 2}), "do not run with parallel.pipeline_parallel_size = 2"),
        (dict(parallel={"tensor_parallel_size": 2}), "do not run with parallel.sequence_parallel"),
        (dict(tasks={"paths": ["x"], "interval": 0}), "interval"),
    ],
)
def test_what_cannot_evaluate_is_refused(config, change, message):
    with pytest.raises((ConfigError, ValueError)) as caught:
        RunConfig.model_validate(config | change)
    assert message in str(caught.value)
