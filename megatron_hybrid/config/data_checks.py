"""Checks of the data against model and training."""

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import Problems, join
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.train import TrainConfig


def check_mixes(data: DataConfig, problems: Problems) -> None:
    """Check that every source has a weight at some time, and that changes of the mix are in order."""
    if not any(source.weight for source in data.train):
        problems.add("data.train", "all weights are 0; give at least one source a weight")
    given = [
        [change.weights[i] for change in data.mix_changes if i < len(change.weights)] for i in range(len(data.train))
    ]
    for i, source in enumerate(data.train):
        if not source.weight and not any(given[i]):
            problems.add(
                join("data.train", i, "weight"),
                "0, and no change of the mix gives the source a weight; remove the source",
            )
    for field, source in data.sources().items():
        if not source.weight and field.startswith("data.validation"):
            problems.add(join(field, "weight"), "0 leaves nothing of the source; remove the source")
    before = 0
    for number, change in enumerate(data.mix_changes):
        field = join("data.mix_changes", number)
        if len(change.weights) != len(data.train):
            text = f"{len(change.weights)} for {len(data.train)} sources; give one for each source of data.train, 0 for none"
            problems.add(join(field, "weights"), text)
        elif not any(change.weights):
            problems.add(join(field, "weights"), "all are 0; give at least one source a weight")
        samples = -(-change.after_tokens // data.sequence_length)
        if samples <= before:
            text = (
                f"{change.after_tokens} is not a whole sample after the change before it; give them in ascending order"
            )
            problems.add(join(field, "after_tokens"), text)
        before = samples


def check_data(model: ModelConfig, data: DataConfig, train: TrainConfig, problems: Problems) -> None:
    """Check validation sources and token types."""
    if train.eval_interval is not None and not data.validation:
        problems.add(
            "train.eval_interval",
            f"{train.eval_interval} has nothing to evaluate on; give data.validation a source, or set it to null",
        )
    for field, source in data.files().items():
        if source.dtype == "uint16" and model.vocab_size > 2**16:
            problems.add(
                join(field, "dtype"),
                f"uint16 does not hold model.vocab_size = {model.vocab_size} tokens; the nearest is uint32",
            )
