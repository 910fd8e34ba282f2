"""A whole run: every section, and the checks that need more than one of them."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import import_plugins
from megatron_hybrid.base.section import Section
from megatron_hybrid.config import checks
from megatron_hybrid.config.checkpoint import CheckpointConfig
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.logging import LoggingConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.preflight import PreflightConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.config.zero import ZeroConfig


class RunConfig(Section):
    """Everything `tools/pretrain.py` needs."""

    run_dir: str = Field(min_length=1)
    """Folder of everything the run writes: config.yaml, metrics.jsonl, loss.png, tensorboard/, checkpoints/."""
    plugins: tuple[str, ...] = Field((), strict=False)
    """Modules to import before the configuration is validated, such as `my_package.my_mixer`. They register mixers
    (docs/development/extending.md)."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    preflight: PreflightConfig = PreflightConfig()

    @model_validator(mode="before")
    @classmethod
    def _import_plugins(cls, data: Any) -> Any:
        names = data.get("plugins") if isinstance(data, Mapping) else None
        if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
            import_plugins(names)
        return data

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        checks.section_problems(self).raise_if_any()
        return self

    def check_world(self, world_size: int) -> None:
        """Check what depends on the number of ranks.

        Raises:
            ConfigError: degrees that do not divide world_size, or a batch that does not divide by data parallel ranks.
        """
        checks.world_problems(self, world_size).raise_if_any()
