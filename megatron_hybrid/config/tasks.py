"""Downstream tasks that a run evaluates while it trains."""

from dataclasses import dataclass

from pydantic import Field, PositiveInt

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import round_up
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
    """Most sequences per batch on each data parallel rank. A batch of choices has at most the tokens of a micro-batch of training."""


TOKENS_PER_RANK = 64
"""Sequences are padded to a multiple of this many tokens on each rank, which FP8's alignments divide."""
MICRO_BATCHES = 8
"""Micro-batches per pipeline stage that are scored in one call. More make the pipeline's bubble smaller."""


@dataclass(frozen=True)
class ScoringSizes:
    """Sizes of the batches in which a run scores the choices of tasks. None needs more memory than a batch of training."""

    max_length: int
    """Longest sequence: that of training."""
    length_unit: int
    """Other sequences are padded to a multiple of this."""
    micro_batch_size: int
    """Sequences per micro-batch of the longest sequences: that of training."""
    most_rows: int
    """Most shorter sequences per micro-batch."""
    micro_batches: int
    """Most micro-batches per call."""
    micro_batch_unit: int
    """The number of micro-batches is a multiple of this."""

    def length(self, longest: int) -> int:
        """Return the length to which sequences of up to `longest` tokens are padded."""
        return min(round_up(longest, self.length_unit), self.max_length)

    def slots(self, samples: int, micro_batch_samples: int) -> int:
        """Return the number of samples in whole micro-batches of all data parallel ranks together, padding included."""
        return round_up(samples, micro_batch_samples * self.micro_batch_unit)

    def rows(self, length: int) -> int:
        """Return the number of sequences of a length per micro-batch."""
        if length == self.max_length:
            return self.micro_batch_size
        return max(1, min(self.most_rows, self.micro_batch_size * self.max_length // length))


def scoring_sizes(
    tasks: TasksConfig, sequence_length: int, train: TrainConfig, parallel: ParallelConfig
) -> ScoringSizes:
    """Return the sizes of batches that a run's layout can score."""
    shards = parallel.context_parallel_size * (parallel.tensor_parallel_size if parallel.sequence_parallel_on else 1)
    stages = parallel.pipeline_parallel_size
    fixed = parallel.tp_comm_overlap  # its buffers have the size of a micro-batch of training
    return ScoringSizes(
        max_length=sequence_length,
        length_unit=sequence_length if fixed else TOKENS_PER_RANK * shards,
        micro_batch_size=train.micro_batch_size,
        most_rows=tasks.batch_size,
        micro_batches=MICRO_BATCHES * stages,
        micro_batch_unit=stages if parallel.virtual_pipeline_parallel_size > 1 else 1,
    )


def generation_problems(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> Problems:
    """Return why a run cannot evaluate tasks that generate text, which needs caches, whole layers and whole sequences per rank."""
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
    problems = Problems()
    for found, what in obstacles:
        if found:
            problems.add(
                "tasks.paths",
                f"tasks that generate text do not run with {what}; evaluate checkpoints with megatron-hybrid evaluate-tasks instead",
            )
    for symbol, block in model.blocks_by_symbol.items():
        if not mixer_spec(block.mixer).has_cache:
            problems.add(
                "tasks.paths",
                f"tasks that generate text need caches, and {block.title} (layer_pattern's {symbol}) has none; remove them",
            )
    return problems
