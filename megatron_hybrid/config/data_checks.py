"""Checks of the data against model and training."""

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import Problems, join
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.train import TrainConfig


def check_data(model: ModelConfig, data: DataConfig, train: TrainConfig, problems: Problems) -> None:
    """Check validation sources and token types."""
    if train.eval_interval is not None and not data.validation:
        problems.add(
            "train.eval_interval",
            f"{train.eval_interval} has nothing to evaluate on; give data.validation a source, or set it to null",
        )
    for field, source in data.sources().items():
        if source.dtype == "uint16" and model.vocab_size > 2**16:
            problems.add(
                join(field, "dtype"),
                f"uint16 does not hold model.vocab_size = {model.vocab_size} tokens; the nearest is uint32",
            )
