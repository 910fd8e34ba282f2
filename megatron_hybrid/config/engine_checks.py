"""Checks of train.engine against the sections that only one engine reads."""

from megatron_hybrid.base.errors import Problems, join, shown
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.config.zero import ZeroConfig


def check_engine(
    train: TrainConfig, parallel: ParallelConfig, precision: PrecisionConfig, zero: ZeroConfig, problems: Problems
) -> None:
    """Check that no field is set that the engine does not read or cannot do."""
    if train.engine == "deepspeed":
        _check_deepspeed(parallel, precision, problems)
        return
    for name, field in ZeroConfig.model_fields.items():
        value = getattr(zero, name)
        if value != field.default:
            problems.add(
                join("zero", name),
                f"{shown(value)} has no meaning with train.engine = megatron; set that to deepspeed, or leave zero out",
            )


def _check_deepspeed(parallel: ParallelConfig, precision: PrecisionConfig, problems: Problems) -> None:
    if parallel.pipeline_parallel_size > 1:
        problems.add(
            "parallel.pipeline_parallel_size",
            f"{parallel.pipeline_parallel_size} cannot run with train.engine = deepspeed: its ZeRO reduces and shards the gradients "
            "after each micro-batch's backward pass, and a pipeline has several micro-batches in flight; set it to 1, or "
            "train.engine to megatron",
        )
    if parallel.context_parallel_size > 1:
        problems.add(
            "parallel.context_parallel_size",
            f"{parallel.context_parallel_size} is for train.engine = megatron, whose data parallel groups include these ranks; set "
            "it to 1, or train.engine to megatron",
        )
    for name in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "bucket_size"):
        value = getattr(parallel, name)
        if value != ParallelConfig.model_fields[name].default:
            problems.add(
                join("parallel", name),
                f"{shown(value)} is for train.engine = megatron; leave it out: zero.stage says what is sharded",
            )
    if parallel.tp_comm_overlap:
        problems.add("parallel.tp_comm_overlap", "true is for train.engine = megatron; set that, or this to false")
    if precision.fp8:
        problems.add(
            "precision.fp8_recipe",
            f"{precision.fp8_recipe} needs megatron's fp32 gradient buffers; set train.engine to megatron, or this to null",
        )
