"""Checks that need more than one section, or the number of ranks."""

from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

from megatron_hybrid.arch.fp8_recipes import RECOMMENDED
from megatron_hybrid.arch.mixer import Layout, layout_problems
from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import ConfigError, Problems, join
from megatron_hybrid.config.document_checks import check_documents
from megatron_hybrid.config.fp8_checks import check_precision
from megatron_hybrid.config.zero import check_engine

if TYPE_CHECKING:
    from megatron_hybrid.config.run import RunConfig

_LARGEST_DEGREE = 4096
"""Up to which a tensor parallel degree that fits is looked for."""


def section_problems(run: "RunConfig") -> Problems:
    """What no section can see alone."""
    problems = Problems()
    _check_tensor_parallel(run, problems)
    _check_context_parallel(run, problems)
    _check_mixers(run, problems)
    _check_overlap(run, problems)
    _check_optimizer(run, problems)
    _check_offload(run, problems)
    try:
        run.parallel.stage_layers(run.model.num_layers)
    except ConfigError as error:
        problems += [(join("parallel", field), message) for field, message in error.problems]
    _check_data(run, problems)
    check_documents(run.data, problems)
    check_precision(run, problems)
    check_engine(run, problems)
    return problems


def world_problems(run: "RunConfig", world_size: int) -> Problems:
    """What does not fit `world_size` ranks."""
    problems, parallel, train = Problems(), run.parallel, run.train
    if world_size < 1 or world_size % parallel.replica_size:
        _degrees_do_not_divide(run, world_size, problems)
        return problems
    ranks = parallel.data_parallel_size(world_size)
    unit = train.micro_batch_size * ranks
    words = f"micro_batch_size {train.micro_batch_size} x data parallel size {ranks} = {unit}"
    if train.global_batch_size % unit:
        near = nearest.multiples(train.global_batch_size, unit)
        problems.add(
            "train.global_batch_size",
            f"{train.global_batch_size} is not a multiple of {words}; the nearest are {near}",
        )
        return problems
    if parallel.virtual_pipeline_parallel_size > 1:
        microbatches, stages = train.global_batch_size // unit, parallel.pipeline_parallel_size
        unit *= stages
        words = f"micro batch x data parallel x pipeline parallel size (interleaved schedule) = {unit}"
        if microbatches % stages:
            near = nearest.multiples(train.global_batch_size, unit)
            problems.add(
                "train.global_batch_size",
                f"{train.global_batch_size} makes {microbatches} microbatches, and the interleaved schedule needs a "
                f"multiple of pipeline_parallel_size = {stages}; the nearest are {near}, or set "
                "virtual_pipeline_parallel_size to 1",
            )
            return problems
    _check_ramp(run, unit, words, problems)
    return problems


def _check_tensor_parallel(run: "RunConfig", problems: Problems) -> None:
    """Heads, MLP and sequence over the tensor parallel ranks."""
    size, limits = run.parallel.tensor_parallel_size, _head_limits(run)
    ffn, sequence = run.model.ffn_hidden_size, run.data.sequence_length
    split_sequence = run.parallel.sequence_parallel is not False
    most = min([heads for heads, _ in limits] + [_LARGEST_DEGREE])
    fits = [t for t in range(1, most + 1) if ffn % t == 0 and not (split_sequence and sequence % t)]
    remedy = f"the nearest tensor_parallel_size that fits is {nearest.among(size, fits)}"
    for heads, what in limits:
        if size > heads:
            problems.add("parallel.tensor_parallel_size", f"{size} exceeds the {heads} {what}; {remedy}")
    if ffn % size:
        problems.add(
            "model.ffn_hidden_size",
            f"{ffn} is not a multiple of tensor_parallel_size = {size}; the nearest is {nearest.multiple(ffn, size)}; "
            f"or keep it: {remedy}",
        )
    if run.parallel.sequence_parallel_on and sequence % size:
        problems.add(
            "data.sequence_length",
            f"{sequence} is not a multiple of tensor_parallel_size = {size}, as sequence parallelism needs; the "
            f"nearest is {nearest.multiple(sequence, size)}, or set parallel.sequence_parallel to false",
        )


def _check_context_parallel(run: "RunConfig", problems: Problems) -> None:
    """Check that every context parallel rank has an equal slice of every sequence."""
    size, sequence = run.parallel.context_parallel_size, run.data.sequence_length
    if size == 1:
        return
    tensor = run.parallel.tensor_parallel_size
    shared = tensor if run.parallel.sequence_parallel_on else 1
    words = f"context_parallel_size {size}" + (f" x tensor_parallel_size {tensor}" if shared > 1 else "")
    if sequence % (size * shared) and not (shared > 1 and sequence % shared):  # of that, tensor parallelism has told
        problems.add(
            "data.sequence_length",
            f"{sequence} is not a multiple of {words} = {size * shared}; the nearest is "
            f"{nearest.multiple(sequence, size * shared)}",
        )


def _check_overlap(run: "RunConfig", problems: Problems) -> None:
    """parallel.tp_comm_overlap is Transformer Engine's, and its buffers hold bf16, or FP8 with one scale a tensor."""
    if not run.parallel.tp_comm_overlap:
        return
    field = "parallel.tp_comm_overlap"
    if run.train.dtype == "fp32":
        problems.add(field, "true is Transformer Engine's, which needs train.dtype bf16; set that, or this to false")
    if run.model.backend == "local":
        problems.add(
            field, "true is Transformer Engine's; set model.backend to auto or transformer_engine, or this to false"
        )
    if (recipe := run.precision.recipe) is not None and not recipe.user_buffers:
        problems.add(
            field,
            f"true cannot exchange {recipe.name} FP8, whose scales are separate tensors; set precision.fp8_recipe to "
            f"{RECOMMENDED.name}, or this to false",
        )


def _check_optimizer(run: "RunConfig", problems: Problems) -> None:
    """Check that the distributed optimizer supports train.optimizer.name."""
    name, sharded = run.train.optimizer.name, run.parallel.distributed_optimizer and run.train.engine == "megatron"
    if sharded and not OPTIMIZERS[name].distributed:
        able = " or ".join(other for other, spec in OPTIMIZERS.items() if spec.distributed)
        problems.add(
            "train.optimizer.name",
            f"{name} does not run with parallel.distributed_optimizer; set that to false, or this to {able}",
        )


def _check_offload(run: "RunConfig", problems: Problems) -> None:
    """train.optimizer.offload_fraction is megatron-core's: HybridDeviceOptimizer under its distributed optimizer."""
    field, fraction = "train.optimizer.offload_fraction", run.train.optimizer.offload_fraction
    if not fraction:
        return
    if run.train.engine == "deepspeed":
        problems.add(
            field,
            f"{fraction:g} is for train.engine = megatron; set it to 0.0, and for DeepSpeed's own zero.offload_optimizer to cpu",
        )
        return
    if not run.parallel.distributed_optimizer:
        problems.add(
            field,
            f"{fraction:g} needs parallel.distributed_optimizer, the one that hands Adam what it keeps; set that to true, or this "
            "to 0.0",
        )
    if run.precision.fp8_param_gather:
        problems.add(
            field,
            f"{fraction:g} cannot keep masters of weights held in FP8: they are copied back as bf16, not cast; set "
            "precision.fp8_param_gather to false, or this to 0.0",
        )


def _head_limits(run: "RunConfig") -> list[tuple[int, str]]:
    """Return the head groups that tensor parallelism shares: more ranks than groups would hold dummies alone."""
    groups = (mixer_spec(block.mixer).head_groups(run.model, block) for block in run.model.blocks_by_symbol.values())
    return list(dict.fromkeys((group.count, f"{group.title} ({group.field})") for group in groups))


def layout_of(run: "RunConfig") -> Layout:
    """Return the numbers of the run's layout that mixers may depend on."""
    return Layout(
        tensor_parallel_size=run.parallel.tensor_parallel_size,
        context_parallel_size=run.parallel.context_parallel_size,
        sequence_length=run.data.sequence_length,
        fp8=run.precision.fp8,
        fp8_attention=run.precision.fp8_attention,
    )


def _check_mixers(run: "RunConfig", problems: Problems) -> None:
    """Check the layout against the rules of each mixer in layer_pattern."""
    for symbol, block in run.model.blocks_by_symbol.items():
        problems += layout_problems(mixer_spec(block.mixer), run.model, block, symbol, layout_of(run))


def _check_data(run: "RunConfig", problems: Problems) -> None:
    """What the model and the trainer ask of the data."""
    if run.train.eval_interval is not None and not run.data.validation:
        problems.add(
            "train.eval_interval",
            f"{run.train.eval_interval} has nothing to evaluate on; give data.validation a source, or set it to null",
        )
    for split in ("train", "validation"):
        for index, source in enumerate(getattr(run.data, split)):
            if source.dtype == "uint16" and run.model.vocab_size > 2**16:
                problems.add(
                    join("data", split, index, "dtype"),
                    f"uint16 does not hold model.vocab_size = {run.model.vocab_size} tokens; the nearest is uint32",
                )


def _degrees_do_not_divide(run: "RunConfig", world_size: int, problems: Problems) -> None:
    """Tensor x pipeline x context parallel ranks that do not divide the world."""
    sizes = {
        name: getattr(run.parallel, f"{name}_parallel_size")
        for name in ("tensor", "pipeline", "context")
        if name != "context" or run.parallel.context_parallel_size > 1
    }
    all_of_them = run.parallel.replica_size
    if world_size < 1:
        problems.add("world_size", f"{world_size} ranks cannot train; run on {all_of_them}, or a multiple of it")
        return
    so_far = accumulate(sizes.values(), mul)
    name = next(name for name, ranks in zip(sizes, so_far, strict=True) if world_size % ranks)
    remedy = f"run on {nearest.multiples(world_size, all_of_them)} ranks"
    held = all_of_them // sizes[name]
    if world_size % held == 0:
        remedy += f", or set it to {nearest.divisor(sizes[name], world_size // held)}"
    words = " x ".join(f"{name}_parallel_size {size}" for name, size in sizes.items())
    problems.add(
        f"parallel.{name}_parallel_size",
        f"{words} = {all_of_them} does not divide the {world_size} ranks of this run; {remedy}",
    )


def _check_ramp(run: "RunConfig", unit: int, words: str, problems: Problems) -> None:
    """Every batch size of the ramp must be a multiple of `unit`, as the full one is."""
    ramp, full = run.train.batch_ramp, run.train.global_batch_size
    if ramp is None:
        return
    if ramp.start % unit:
        near = nearest.multiples(ramp.start, unit)
        problems.add("train.batch_ramp.start", f"{ramp.start} is not a multiple of {words}; the nearest are {near}")
    if ramp.start < full and ramp.increment % unit:
        start = min(full, nearest.multiple(ramp.start, unit))
        best = unit * nearest.divisor(max(1, round(ramp.increment / unit)), max(1, (full - start) // unit))
        problems.add(
            "train.batch_ramp.increment", f"{ramp.increment} is not a multiple of {words}; the nearest is {best}"
        )
