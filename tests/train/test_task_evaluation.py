"""Downstream tasks during training: the metrics of a run are those of its checkpoint, and every layout scores choices alike."""

import json
import random
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_hybrid.arch.fp8_recipes import FP8_RECIPES
from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.tasks import TOKENS_PER_RANK, ScoringSizes, TasksConfig, scoring_sizes
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.evaluation.engine_scores import EngineScorer
from megatron_hybrid.evaluation.stdlib_tasks import write_stdlib_tasks
from megatron_hybrid.train.callbacks.task_evaluation import TaskEvaluation
from testing.layouts import layout
from testing.models import hybrid
from tests.data.files import write_raw
from tests.train import task_jobs

MODEL = hybrid("GGGA", 48, 6, 8, key_heads=3, num_key_value_heads=3, head_dim=8)
TRAIN = dict(steps=1, global_batch_size=8, micro_batch_size=2, dtype="fp32")
LAYOUTS = {
    # name: (ranks, layout, DeepSpeed's zero section)
    "one rank": (1, layout(), None),
    "TP2, PP2": (4, layout(2, 2), None),
    "CP2, TP2": (4, layout(2, cp=2), None),
    "PP2, VPP2, DP2, overlapped": (4, layout(pp=2, vpp=2, overlap_grad_reduce=True, overlap_param_gather=True), None),
    "ZeRO 3, DP2": (2, layout(), {"stage": 3}),
}


def _pairs() -> list[tuple[list[int], list[int]]]:
    """Return contexts and continuations of many lengths, some longer than a sequence together."""
    draw = random.Random(0)
    sizes = [(1, 1), (3, 5), (60, 4), (61, 4), (100, 27), (150, 10), (151, 10), (200, 30), (1, 160), (90, 3), (64, 1)]
    return [([draw.randrange(131) for _ in range(a)], [draw.randrange(131) for _ in range(b)]) for a, b in sizes]


PAIRS = _pairs()


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


@pytest.fixture(scope="module")
def by_caches(ranks):
    return ranks.run(task_jobs.scores_with_caches, 1, model=MODEL, train=TRAIN, pairs=PAIRS)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_of_choices_under_every_layout(name, ranks, by_caches):
    count, parallel, zero = LAYOUTS[name]
    if zero and find_spec("deepspeed") is None:
        pytest.skip("no DeepSpeed here")
    train = TRAIN | ({"engine": "deepspeed"} if zero else {})
    found = ranks.run(task_jobs.scores, count, model=MODEL, parallel=parallel, train=train, zero=zero, pairs=PAIRS)
    assert all(result == found[0] for result in found)
    assert found[0] == pytest.approx(by_caches, rel=1e-6)
    assert len(set(found[0])) == len(PAIRS)


def test_sizes_of_batches():
    """No batch has more tokens than one of training, and FP8's alignment and the overlap's buffers are kept."""

    def sizes(**layout: Any) -> ScoringSizes:
        train = TrainConfig(steps=1, global_batch_size=8, micro_batch_size=2)
        return scoring_sizes(TasksConfig(batch_size=8), 4096, train, ParallelConfig(**layout))

    plain = sizes()
    assert [plain.length(n) for n in (1, 64, 65, 4095)] == [64, 64, 128, 4096]
    assert [plain.rows(n) for n in (64, 1024, 2048, 4096)] == [8, 8, 4, 2]
    assert sizes(tensor_parallel_size=2, context_parallel_size=2).length(1) == 256
    assert sizes(tensor_parallel_size=2, sequence_parallel=False).length(1) == 64
    assert all(TOKENS_PER_RANK % recipe.alignment == 0 for recipe in FP8_RECIPES.values())
    overlapped = sizes(tensor_parallel_size=2, tp_comm_overlap=True)
    assert (overlapped.length(1), overlapped.rows(4096)) == (4096, 2)
    assert sizes(pipeline_parallel_size=2, virtual_pipeline_parallel_size=2).micro_batch_unit == 2


@pytest.mark.parametrize("context", [[], [0] * 3])
def test_pairs_that_cannot_be_scored(context):
    sizes = scoring_sizes(TasksConfig(), 4, TrainConfig(steps=1, global_batch_size=1), ParallelConfig())
    scorer = EngineScorer(lambda batches: pytest.fail("it ran"), SimpleNamespace(), sizes, 97)
    with pytest.raises(UserError, match="5 tokens, which do not fit" if context else "no tokens"):
        scorer.log_likelihoods([(context, [1] * (5 if context else 1))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pipeline_parallel_size": 2}, "do not run with parallel.pipeline_parallel_size = 2"),
        ({"tensor_parallel_size": 2}, "do not run with parallel.sequence_parallel"),
    ],
)
def test_generation_is_refused_before_the_first_step(config, change, message):
    run = SimpleNamespace(config=RunConfig.model_validate(config | {"parallel": change}))
    with pytest.raises(ConfigError, match=message):
        TaskEvaluation(run.config.tasks).setup(run)
