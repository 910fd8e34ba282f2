"""A whole run: every section, and the checks that need more than one of them."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.base.section import Section
from megatron_hybrid.config import checks
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.config.zero import ZeroConfig


class CheckpointConfig(Section):
    """When to save, what to keep, where to start from."""

    interval: PositiveInt | None = 1000
    """Steps between checkpoints; None: only the last."""
    keep_last: PositiveInt | None = 2
    """Newest checkpoints of this run to keep; None: all."""
    keep_every: PositiveInt | None = None
    """Keep checkpoints whose step is a multiple of this permanently; a multiple of interval."""
    async_save: bool = False
    """Write while training goes on."""
    load: str = Field("auto", min_length=1)
    """Where to start. `auto`: the run's newest complete checkpoint, or initial weights where it has none. `none`: initial
    weights; an error where run_dir has checkpoints. A folder: that checkpoint. A run that began from another run's
    checkpoint resumes its own. An earlier checkpoint of the run itself rewinds it: later ones are set aside, not deleted."""

    weights_only: bool = False
    """Take only the weights of the checkpoint that `load` names: a new stage, with its own schedule, data and moments.
    The run's own checkpoints are always resumed whole."""
    allow_changes: tuple[str, ...] = Field((), strict=False)
    """Fields of `data` and `model` that may differ from those of the run that saved the checkpoint: `[data.seed]`, or
    `[data, model.rope_theta]`. Without it, changes that repeat or skip samples or change the model are errors."""

    @model_validator(mode="after")
    def _check(self) -> "CheckpointConfig":
        if self.weights_only and self.load in ("auto", "none"):
            raise ConfigError.at(
                "weights_only",
                f"true needs a checkpoint to take weights from, and load is {self.load}; give load a folder, or set this "
                "to false",
            )
        for name in self.allow_changes:
            if name.partition(".")[0] not in ("data", "model"):
                raise ConfigError.at(
                    "allow_changes",
                    f"{name} is no field of data or model; other fields may change without it: leave it out",
                )
        if self.keep_every is None:
            return self
        if self.interval is None:
            raise ConfigError.at(
                "keep_every",
                f"{self.keep_every} has nothing to keep while interval is null; set it to null too",
            )
        if self.keep_every % self.interval:
            best = nearest.multiple(self.keep_every, self.interval)
            raise ConfigError.at(
                "keep_every",
                f"{self.keep_every} is not a multiple of checkpoint.interval = {self.interval}; the nearest is {best}",
            )
        return self


class LoggingConfig(Section):
    """What a run tells about itself."""

    interval: PositiveInt = 1
    """Steps between lines of metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    wandb_project: str | None = None
    """Send metrics to this Weights & Biases project; None: do not."""
    plot_interval: NonNegativeInt = 100
    """Steps between updates of loss.png; 0: only at the end."""
    peak_tflops: PositiveFloat | None = None
    """A device's peak for MFU; None: known from the device's name, else no MFU."""


class PreflightConfig(Section):
    """What is checked on all nodes before the first step (`python tools/preflight.py` checks the same alone)."""

    enabled: bool | None = None
    """None: where more than one rank runs."""
    all_reduce_mib: PositiveInt | None = None
    """Size of the all-reduces that are timed; None: 256 on GPUs, 4 on CPU."""
    slow_below: float = Field(0.7, gt=0, lt=1)
    """A device or a node below this share of all nodes' median is slow."""
    slow_nodes: Literal["warn", "stop"] = "warn"
    """What becomes of a run with slow nodes; broken ones stop it in any case."""

    def is_on(self, world_size: int) -> bool:
        """Whether a run of this many ranks begins with the checks."""
        return world_size > 1 if self.enabled is None else self.enabled


class RunConfig(Section):
    """Everything `tools/pretrain.py` needs."""

    run_dir: str = Field(min_length=1)
    """Folder of everything the run writes: config.yaml, metrics.jsonl, loss.png, tensorboard/, checkpoints/."""
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    preflight: PreflightConfig = PreflightConfig()

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
