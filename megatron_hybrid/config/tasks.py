"""Downstream tasks that a run evaluates while it trains."""

from pydantic import Field, PositiveInt

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig


class TasksConfig(Section):
    """Downstream tasks from local files, evaluated without lm-eval (docs/guides/tasks.md)."""

    paths: tuple[str, ...] = Field((), strict=False)
    """YAML files in lm-eval's format, or folders of them. Empty: no tasks."""
    interval: PositiveInt = 1000
    """Steps between evaluations. The last step is evaluated as well."""
    limit: PositiveInt | None = None
    """Documents per task; None: all."""
    batch_size: PositiveInt = 8
    """Sequences per batch on each data parallel rank."""


def check_tasks(
    tasks: TasksConfig, model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> Problems:
    """Return why a run cannot evaluate tasks. They run with caches, on ranks that hold whole layers and whole sequences."""
    problems = Problems()
    if not tasks.paths:
        return problems
    obstacles = (
        (train.engine != "megatron", f"train.engine = {train.engine}"),
        (parallel.pipeline_parallel_size > 1, f"parallel.pipeline_parallel_size = {parallel.pipeline_parallel_size}"),
        (parallel.context_parallel_size > 1, f"parallel.context_parallel_size = {parallel.context_parallel_size}"),
        (
            parallel.sequence_parallel_on,
            "parallel.sequence_parallel, which is on with tensor parallelism unless set to false",
        ),
        (precision.fp8, f"precision.fp8_recipe = {precision.fp8_recipe}"),
    )
    for found, what in obstacles:
        if found:
            problems.add(
                "tasks.paths",
                f"do not run with {what}; evaluate checkpoints with megatron-hybrid evaluate-tasks instead",
            )
    for symbol, block in model.blocks_by_symbol.items():
        if not mixer_spec(block.mixer).has_cache:
            problems.add(
                "tasks.paths", f"need caches, and {block.title} (layer_pattern's {symbol}) has none; remove them"
            )
    return problems
