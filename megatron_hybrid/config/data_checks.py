"""Checks of the data against model and training."""

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import Problems, join
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.train import TrainConfig


def check_data(model: ModelConfig, data: DataConfig, train: TrainConfig, problems: Problems) -> None:
    """Check window, validation sources and token types."""
    window, sequence = model.sliding_window, data.sequence_length
    if "W" in model.layers and window is not None and window > sequence:
        problems.add(
            "model.sliding_window",
            f"{window} exceeds data.sequence_length = {sequence}, so W layers would be plain attention; give at most "
            f"{sequence}, or write A for W in layer_pattern",
        )
    if train.eval_interval is not None and not data.validation:
        problems.add(
            "train.eval_interval",
            f"{train.eval_interval} has nothing to evaluate on; give data.validation a source, or set it to null",
        )
    for split in ("train", "validation"):
        for index, source in enumerate(getattr(data, split)):
            if source.dtype == "uint16" and model.vocab_size > 2**16:
                problems.add(
                    join("data", split, index, "dtype"),
                    f"uint16 does not hold model.vocab_size = {model.vocab_size} tokens; the nearest is uint32",
                )
