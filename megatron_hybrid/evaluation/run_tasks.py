"""Downstream tasks of a command: local files by this package, or any task by lm-eval."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.evaluation.local_tasks import evaluate_task
from megatron_hybrid.evaluation.task_files import read_config, read_tasks, task_paths
from megatron_hybrid.evaluation.task_model import TaskModel


def check_tasks(tasks: Sequence[str], lm_eval: bool) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        UserError: lm-eval is not installed, or a file is no task of the subset that works without it.
    """
    if lm_eval and find_spec("lm_eval") is None:
        raise UserError("--lm-eval: the package lm_eval is not installed; pip install lm_eval")
    if not lm_eval:
        read_tasks(tasks)


def run_tasks(
    model: TaskModel, tasks: Sequence[str], lm_eval: bool, fewshot: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Return the results of each task by its name. lm-eval's are empty on ranks other than the first."""
    if not lm_eval:
        return {task.name: evaluate_task(model, task, limit) for task in read_tasks(tasks)}
    from megatron_hybrid.evaluation.lm_eval_model import evaluate

    given: list[str | dict[str, Any]] = []
    for name in tasks:
        given += [read_config(path) for path in task_paths(Path(name))] if Path(name).exists() else [name]
    return evaluate(model, given, [], fewshot, limit) or {}
