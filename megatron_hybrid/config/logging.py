"""Metrics and plots of a run."""

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section


class LoggingConfig(Section):
    """Metrics and plots that a run writes."""

    interval: PositiveInt = 1
    """Steps between lines of metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard events to run_dir/tensorboard."""
    wandb_project: str | None = Field(None, min_length=1)
    """Weights & Biases project that receives the metrics. None: do not send them."""
    wandb_entity: str | None = Field(None, min_length=1)
    """User or team of the project. None: the default of the account."""
    wandb_name: str | None = Field(None, min_length=1)
    """Name of the run in Weights & Biases. None: the name of run_dir."""
    wandb_tags: tuple[str, ...] = Field((), strict=False)
    """Tags of the run in Weights & Biases."""
    wandb_offline: bool = False
    """Write the metrics for Weights & Biases to run_dir/wandb, for nodes without Internet access. `wandb sync` uploads them later."""
    plot_interval: NonNegativeInt = 100
    """Steps between updates of loss.png. 0: only at the end."""
    peak_tflops: PositiveFloat | None = None
    """Peak dense bf16 TFLOP/s per device, for MFU. None: look it up by the device's name; no MFU if the name is unknown."""

    @model_validator(mode="after")
    def _check(self) -> "LoggingConfig":
        problems = Problems()
        if self.wandb_project is None:
            for name in ("wandb_entity", "wandb_name", "wandb_tags", "wandb_offline"):
                if getattr(self, name):
                    problems.add(name, "has no effect without wandb_project; set logging.wandb_project, or remove it")
        problems.raise_if_any()
        return self
