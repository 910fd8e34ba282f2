"""Checks against the number of ranks: parallel degrees and batch sizes."""

from itertools import accumulate
from operator import mul

from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import Problems
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.train import TrainConfig


def world_problems(train: TrainConfig, parallel: ParallelConfig, world_size: int) -> Problems:
    """Return the degrees and batch sizes that do not fit `world_size` ranks."""
    problems = Problems()
    if world_size < 1 or world_size % parallel.replica_size:
        _degrees_do_not_divide(parallel, world_size, problems)
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
    _check_ramp(train, unit, words, problems)
    return problems


def _degrees_do_not_divide(parallel: ParallelConfig, world_size: int, problems: Problems) -> None:
    """Add a problem for the first degree whose product with those before it does not divide the ranks."""
    sizes = {
        name: getattr(parallel, f"{name}_parallel_size")
        for name in ("tensor", "pipeline", "context")
        if name != "context" or parallel.context_parallel_size > 1
    }
    needed = parallel.replica_size
    if world_size < 1:
        problems.add("world_size", f"{world_size} ranks cannot train; run on {needed}, or a multiple of it")
        return
    products = accumulate(sizes.values(), mul)
    name = next(name for name, ranks in zip(sizes, products, strict=True) if world_size % ranks)
    remedy = f"run on {nearest.multiples(world_size, needed)} ranks"
    others = needed // sizes[name]
    if world_size % others == 0:
        remedy += f", or set it to {nearest.divisor(sizes[name], world_size // others)}"
    words = " x ".join(f"{name}_parallel_size {size}" for name, size in sizes.items())
    problems.add(
        f"parallel.{name}_parallel_size",
        f"{words} = {needed} does not divide the {world_size} ranks of this run; {remedy}",
    )


def _check_ramp(train: TrainConfig, unit: int, words: str, problems: Problems) -> None:
    """Check that every batch size of the ramp is a multiple of `unit`, as the full one is."""
    ramp, full = train.batch_ramp, train.global_batch_size
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
