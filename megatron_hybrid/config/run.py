"""A whole run: every section, and the checks that need more than one of them."""

from pydantic import NonNegativeInt, PositiveInt, model_validator

from megatron_hybrid.config.base import Section
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.train import TrainConfig


class CheckpointConfig(Section):
    """When to save, what to keep, where to start from."""

    interval: PositiveInt | None = 1000
    """Steps between checkpoints; None: only the last."""
    keep_last: PositiveInt | None = 2
    """Newest ones to keep; None: all."""
    keep_every: PositiveInt | None = None
    """Keep those whose step is a multiple of this for good."""
    async_save: bool = False
    """Write while training goes on."""
    load: str = "auto"
    """`auto`: resume from the run's newest complete checkpoint, if any. `none`: start anew. Or a checkpoint's folder."""


class LoggingConfig(Section):
    """What a run tells about itself."""

    interval: PositiveInt = 1
    """Steps between lines of metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    wandb_project: str | None = None
    """Send metrics to this Weights & Biases project; None: do not."""
    plot_interval: NonNegativeInt = 100
    """Steps between updates of loss.png; 0: only at the end."""
    peak_tflops: float | None = None
    """A device's peak for MFU; None: known from the device's name, else no MFU."""


class RunConfig(Section):
    """Everything `tools/pretrain.py` needs."""

    run_dir: str
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        self.parallel.stage_layers(self.model.num_layers)
        return self

    def check_world(self, world_size: int) -> None:
        """Check what depends on the number of ranks.

        Raises:
            ValueError: degrees that do not divide world_size, or a batch that does not divide over the data parallel ranks.
        """
