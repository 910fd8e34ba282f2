"""Checks of the parallel layout against model, data, training and precision."""

from megatron_hybrid.arch.fp8_recipes import RECOMMENDED
from megatron_hybrid.arch.mixer import Layout, layout_problems
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError, Problems, join
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig

_LARGEST_DEGREE = 4096
"""Largest tensor parallel degree that a remedy may suggest."""


def check_tensor_parallel(model: ModelConfig, data: DataConfig, parallel: ParallelConfig, problems: Problems) -> None:
    """Check that heads, MLP and sequence divide by the tensor parallel ranks."""
    size, limits = parallel.tensor_parallel_size, _head_limits(model)
    ffn, sequence = model.ffn_hidden_size, data.sequence_length
    split_sequence = parallel.sequence_parallel is not False
    most = max([heads for heads, _ in limits], default=_LARGEST_DEGREE)
    fits = [t for t in range(1, most + 1) if ffn % t == 0 and not (split_sequence and sequence % t)]
    remedy = f"the nearest tensor_parallel_size that fits is {nearest.among(size, fits)}"
    if size > most:
        known = " and the ".join(f"{heads} {what}" for heads, what in limits)
        problems.add("parallel.tensor_parallel_size", f"{size} exceeds the {known}; {remedy}")
    if ffn % size:
        problems.add(
            "model.ffn_hidden_size",
            f"{ffn} is not a multiple of tensor_parallel_size = {size}; the nearest is {nearest.multiple(ffn, size)}; "
            f"or keep it: {remedy}",
        )
    if parallel.sequence_parallel_on and sequence % size:
        problems.add(
            "data.sequence_length",
            f"{sequence} is not a multiple of tensor_parallel_size = {size}, as sequence parallelism needs; the "
            f"nearest is {nearest.multiple(sequence, size)}, or set parallel.sequence_parallel to false",
        )


def _head_limits(model: ModelConfig) -> list[tuple[int, str]]:
    """Return the head groups that limit the tensor parallel degree. A rank may hold padding heads alone in some layers, as where
    attention has fewer key/value heads than ranks, but not in all.
    """
    groups = (mixer_spec(block.mixer).head_groups(model, block) for block in model.blocks_by_symbol.values())
    return list(dict.fromkeys((group.count, f"{group.title} ({group.field})") for group in groups))


def check_context_parallel(data: DataConfig, parallel: ParallelConfig, problems: Problems) -> None:
    """Check that every context parallel rank has an equal slice of each sequence."""
    size, sequence = parallel.context_parallel_size, data.sequence_length
    if size == 1:
        return
    tensor = parallel.tensor_parallel_size
    shared = tensor if parallel.sequence_parallel_on else 1
    words = f"context_parallel_size {size}" + (f" x tensor_parallel_size {tensor}" if shared > 1 else "")
    already_reported = shared > 1 and sequence % shared  # by check_tensor_parallel
    if sequence % (size * shared) and not already_reported:
        problems.add(
            "data.sequence_length",
            f"{sequence} is not a multiple of {words} = {size * shared}; the nearest is "
            f"{nearest.multiple(sequence, size * shared)}",
        )


def check_mixers(model: ModelConfig, layout: Layout, problems: Problems) -> None:
    """Check the layout against the rules of each mixer in layer_pattern."""
    for symbol, block in model.blocks_by_symbol.items():
        problems += layout_problems(mixer_spec(block.mixer), model, block, symbol, layout)


def check_overlap(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, precision: PrecisionConfig, problems: Problems
) -> None:
    """Check that parallel.tp_comm_overlap has Transformer Engine, in bf16 or FP8 with one scale per tensor."""
    if not parallel.tp_comm_overlap:
        return
    field = "parallel.tp_comm_overlap"
    if train.dtype == "fp32":
        problems.add(field, "true is Transformer Engine's, which needs train.dtype bf16; set that, or this to false")
    if model.backend == "local":
        problems.add(
            field, "true is Transformer Engine's; set model.backend to auto or transformer_engine, or this to false"
        )
    if (recipe := precision.recipe) is not None and not recipe.user_buffers:
        problems.add(
            field,
            f"true cannot exchange {recipe.name} FP8, whose scales are separate tensors; set precision.fp8_recipe to "
            f"{RECOMMENDED.name}, or this to false",
        )


def check_offload(train: TrainConfig, parallel: ParallelConfig, precision: PrecisionConfig, problems: Problems) -> None:
    """Check that train.optimizer.offload_fraction has megatron-core's distributed optimizer, whose state it offloads."""
    field, fraction = "train.optimizer.offload_fraction", train.optimizer.offload_fraction
    if not fraction:
        return
    if train.engine == "deepspeed":
        problems.add(
            field,
            f"{fraction:g} is for train.engine = megatron; set it to 0.0, and for DeepSpeed's own zero.offload_optimizer to cpu",
        )
        return
    if not parallel.distributed_optimizer:
        problems.add(
            field,
            f"{fraction:g} needs parallel.distributed_optimizer, which gives each rank its shard of the state; set that to true, "
            "or this to 0.0",
        )
    if precision.fp8_param_gather:
        problems.add(
            field,
            f"{fraction:g} cannot keep masters of weights held in FP8: they are copied back as bf16, not cast; set "
            "precision.fp8_param_gather to false, or this to 0.0",
        )


def check_stages(model: ModelConfig, parallel: ParallelConfig, problems: Problems) -> None:
    """Check that the layers divide into the pipeline's stages."""
    try:
        parallel.stage_layers(model.num_layers, output_in_layers=0.0)
    except ConfigError as error:
        problems += [(join("parallel", field), message) for field, message in error.problems]
