"""Configuration of a run: all sections, and the checks across sections."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from megatron_hybrid.arch.mixer import Layout
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import import_plugins
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section
from megatron_hybrid.config.checkpoint import CheckpointConfig
from megatron_hybrid.config.cuda_graph_checks import check_cuda_graphs
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.data_checks import check_data, check_mixes
from megatron_hybrid.config.debug import DebugConfig, check_debug
from megatron_hybrid.config.engine_checks import check_engine
from megatron_hybrid.config.generator_checks import check_generators
from megatron_hybrid.config.layout_checks import (
    check_context_parallel,
    check_mixers,
    check_offload,
    check_overlap,
    check_stages,
    check_tensor_parallel,
)
from megatron_hybrid.config.logging import LoggingConfig
from megatron_hybrid.config.optimizer_checks import check_optimizer
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.precision_checks import check_fp8_sizes, check_precision
from megatron_hybrid.config.preflight import PreflightConfig
from megatron_hybrid.config.ramp_checks import check_sequence_ramp
from megatron_hybrid.config.tasks import TasksConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.config.world_checks import world_problems
from megatron_hybrid.config.zero import ZeroConfig


class RunConfig(Section):
    """Everything that `megatron-hybrid pretrain` needs."""

    run_dir: str = Field(min_length=1)
    """Folder of everything the run writes: config.yaml, config-<step>.yaml of every start, metrics.jsonl, loss.png, tensorboard/,
    checkpoints/."""
    plugins: tuple[str, ...] = Field((), strict=False)
    """Modules to import before the configuration is validated, such as `my_package.my_mixer`. They register mixers and sample
    generators (docs/development/extending.md)."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    preflight: PreflightConfig = PreflightConfig()
    debug: DebugConfig = DebugConfig()
    tasks: TasksConfig = TasksConfig()

    @model_validator(mode="before")
    @classmethod
    def _import_plugins(cls, data: Any) -> Any:
        names = data.get("plugins") if isinstance(data, Mapping) else None
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            import_plugins(names)
        return data

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        self.section_problems().raise_if_any()
        return self

    @property
    def layout(self) -> Layout:
        """Numbers of the layout that mixers may depend on."""
        return Layout(
            tensor_parallel_size=self.parallel.tensor_parallel_size,
            context_parallel_size=self.parallel.context_parallel_size,
            sequence_length=self.data.sequence_length,
            fp8=self.precision.fp8,
            fp8_attention=self.precision.fp8_attention,
            documents=self.data.documents,
            cuda_graphs=self.train.cuda_graph_impl,
        )

    def section_problems(self) -> Problems:
        """Return the contradictions between sections."""
        model, data, train, parallel, precision = self.model, self.data, self.train, self.parallel, self.precision
        problems = Problems()
        check_tensor_parallel(model, data, parallel, problems)
        check_context_parallel(data, parallel, problems)
        check_mixers(model, self.layout, problems)
        check_overlap(model, train, parallel, precision, problems)
        check_optimizer(train, parallel, precision, problems)
        check_offload(train, parallel, precision, problems)
        check_stages(model, parallel, problems)
        check_data(model, data, train, problems)
        check_mixes(data, problems)
        check_generators(model, data, train, parallel, problems)
        check_sequence_ramp(model, data, train, parallel, self.layout, problems)
        check_precision(model, train, parallel, precision, problems)
        check_fp8_sizes(model, data, train, parallel, precision, problems)
        check_engine(train, parallel, precision, self.zero, problems)
        check_debug(train, self.debug, problems)
        check_cuda_graphs(train, parallel, precision, self.debug, problems)
        return problems

    def check_world(self, world_size: int) -> None:
        """Check the parallel degrees and batch sizes against the number of ranks.

        Raises:
            ConfigError: degrees that do not divide world_size, or a batch that does not divide by the data parallel ranks.
        """
        world_problems(self.train, self.parallel, world_size).raise_if_any()
