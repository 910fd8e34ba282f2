"""Jobs of test_task_evaluation.py, which run on ranks."""

from pathlib import Path

from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.tasks import TasksConfig, scoring_sizes
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.data.tokenizer import ByteTokenizer
from megatron_hybrid.evaluation.engine_scores import EngineScorer
from megatron_hybrid.evaluation.task_model import TaskModel
from megatron_hybrid.inference.load import LoadedModel
from testing import jobs
from testing.task_parity import run_tasks_of

LENGTH = 160
Pairs = list[tuple[list[int], list[int]]]


def train(config: dict) -> None:
    """Train a run."""
    jobs.pretrain_run(config)


def evaluate(path: str, tasks: str, limit: int) -> dict[str, dict[str, float]]:
    """Return the results of tasks on the newest checkpoint of a run."""
    return run_tasks_of(Path(path), Path(tasks), limit, max_length=128)


def scores(model: dict, parallel: dict, train: dict, zero: dict | None, pairs: Pairs) -> list[float]:
    """Return the log-likelihoods of continuations by the engine's evaluation, with initial weights."""
    engine = jobs.make_engine(model, parallel, train, LENGTH, zero=zero)
    sizes = scoring_sizes(TasksConfig(batch_size=3), LENGTH, TrainConfig(**train), ParallelConfig(**parallel))
    return EngineScorer(engine.evaluate, engine.groups, sizes, model["vocab_size"]).log_likelihoods(pairs)


def scores_with_caches(model: dict, train: dict, pairs: Pairs) -> list[float]:
    """Return the log-likelihoods of continuations by chunked prefill on one rank."""
    (network,) = jobs.make_engine(model, {}, train, LENGTH).chunks
    loaded = LoadedModel(network.eval(), network.model, {}, None)
    return TaskModel(loaded, ByteTokenizer(), LENGTH).log_likelihoods(pairs)
