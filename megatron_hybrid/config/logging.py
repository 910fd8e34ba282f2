"""Metrics and plots of a run."""

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from megatron_hybrid.base.section import Section


class LoggingConfig(Section):
    """Metrics and plots that a run writes."""

    interval: PositiveInt = 1
    """Steps between lines of metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    """Write TensorBoard events to run_dir/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project that receives the metrics. None: do not send them."""
    plot_interval: NonNegativeInt = 100
    """Steps between updates of loss.png. 0: only at the end."""
    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s per device, for MFU. None: look it up by the device's name; no MFU if the name is unknown."""
