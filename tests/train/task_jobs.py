"""Jobs of test_task_evaluation.py, which run on ranks."""

from pathlib import Path

from testing import jobs
from testing.task_parity import run_tasks_of


def train(config: dict) -> None:
    """Train a run."""
    jobs.pretrain_run(config)


def evaluate(path: str, tasks: str, limit: int) -> dict[str, dict[str, float]]:
    """Return the results of tasks on the newest checkpoint of a run."""
    return run_tasks_of(Path(path), Path(tasks), limit, max_length=128)
