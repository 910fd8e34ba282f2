"""Check of train.sequence_ramp against data, model and layout."""

from dataclasses import replace

from megatron_hybrid.arch.mixer import Layout
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.layout_checks import check_context_parallel, check_mixers, check_tensor_parallel
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.train import TrainConfig


def check_sequence_ramp(
    model: ModelConfig,
    data: DataConfig,
    train: TrainConfig,
    parallel: ParallelConfig,
    layout: Layout,
    problems: Problems,
) -> None:
    """Check that samples divide into the shortest sequences, and that these fit the layout, as whole samples do."""
    ramp, field = train.sequence_ramp, "train.sequence_ramp.start"
    if ramp is None:
        return
    doublings = (data.sequence_length // ramp.start).bit_length() - 1
    if doublings < 1 or ramp.start << doublings != data.sequence_length:
        problems.add(
            field,
            f"{ramp.start} is not data.sequence_length = {data.sequence_length} divided by 2, 4, 8 or another power of two; the "
            f"nearest is {max(1, data.sequence_length >> max(doublings, 1))}",
        )
        return
    if data.documents != "keep":
        problems.add(
            field,
            f"{ramp.start} would cut documents, and data.documents is {data.documents}; set it to keep, or the ramp to null",
        )
    found = Problems()
    short = data.model_copy(update={"sequence_length": ramp.start})
    check_tensor_parallel(model, short, parallel, found)
    check_context_parallel(short, parallel, found)
    check_mixers(model, replace(layout, sequence_length=ramp.start), found)
    for name, text in found:
        if name in ("data.sequence_length", "parallel.context_parallel_size") and name not in dict(problems):
            problems.add(field, f"{ramp.start} does not fit the layout ({text})")
