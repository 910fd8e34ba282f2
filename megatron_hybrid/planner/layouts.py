"""Enumeration of every layout of a job: a plan for each legal one, the reason for each other."""

from collections.abc import Iterator
from typing import Any

from megatron_hybrid.config.parallel import LARGEST_OVERLAP, ParallelConfig
from megatron_hybrid.config.world_checks import world_problems
from megatron_hybrid.planner.job import Job
from megatron_hybrid.planner.plan import Plan

Degrees = dict[str, Any]
Outcome = Plan | str
"""Plan of a legal layout, or why it is not legal."""
MOST_VIRTUAL, MOST_MICRO_BATCH = 8, 16
NO_SEQUENCE_PARALLELISM = (
    "as many bytes on the wire as with sequence parallelism, and the residual stream whole on every rank"
)
PLAIN_OPTIMIZER = (
    "as many bytes on the wire as with the distributed optimizer, and all of the optimizer's state on every rank"
)
SHORTEST_SLICE = 2048
"""Fewest tokens of a sequence per context parallel rank. Below it, latencies take most of the step."""


def degrees_of(plan: Plan) -> Degrees:
    """Return a plan's degrees by the short names that --why takes."""
    return {
        "tp": plan.tp,
        "sp": plan.parallel.sequence_parallel_on,
        "cp": plan.cp,
        "pp": plan.pp,
        "vpp": plan.vpp,
        "dp": plan.dp,
        "mbs": plan.micro_batch_size,
        "recompute": plan.parallel.recompute_granularity,
        "zero": plan.parallel.distributed_optimizer,
    }


def layouts(job: Job) -> Iterator[tuple[Degrees, Outcome]]:
    """Yield the degrees and the outcome of every layout."""
    per_node = job.hardware.gpus_per_node
    for tp in _divisors(job.gpus):
        if tp > per_node:
            yield {"tp": tp}, f"tensor parallelism over more than a node's {per_node} GPUs waits for the network"
            continue
        for cp in _divisors(job.gpus // tp):
            if reason := _slices_problem(job, tp, cp):
                yield {"tp": tp, "cp": cp}, reason
                continue
            yield from _pipelines(job, {"tp": tp, "cp": cp})


def _slices_problem(job: Job, tp: int, cp: int) -> str:
    """Return why this many ranks cannot share sequences; empty if they can."""
    length = job.sequence_length // cp
    if cp > 1 and length < SHORTEST_SLICE:
        return (
            f"context parallelism would leave a rank {length} tokens of a sequence: latencies would be most of the step"
        )
    run = job.run(_parallel(job, {"tp": tp, "cp": cp, "pp": 1, "vpp": 1, "dp": 1}, tp > 1, "none"), 1)
    found = run.section_problems() if cp > 1 else ()
    return "; ".join(f"{name}: {message}" for name, message in found if name == "parallel.context_parallel_size")


def _pipelines(job: Job, degrees: Degrees) -> Iterator[tuple[Degrees, Outcome]]:
    """Yield every pipeline, micro-batch size and recomputation for these tensor and context parallel sizes."""
    left, num_layers = job.gpus // (degrees["tp"] * degrees["cp"]), job.model.num_layers
    for pp in _divisors(left):
        if pp > num_layers:
            yield degrees | {"pp": pp}, f"more pipeline ranks than the {num_layers} layers"
            continue
        dp = left // pp
        micro_batches = [b for b in _powers(MOST_MICRO_BATCH) if job.global_batch_size % (dp * b) == 0]
        if not micro_batches:
            reason = f"{dp} replicas do not divide the global batch of {job.global_batch_size} sequences"
            yield degrees | {"pp": pp, "dp": dp}, reason
            continue
        for vpp in range(1, (min(MOST_VIRTUAL, num_layers // pp) if pp > 1 else 1) + 1):
            for b in micro_batches:
                yield from _variants(job, degrees | {"pp": pp, "vpp": vpp, "dp": dp}, b)


def _variants(job: Job, sizes: Degrees, b: int) -> Iterator[tuple[Degrees, Outcome]]:
    """Yield the variants of one set of degrees that are ruled out at once, then one plan per recomputation."""
    degrees = sizes | {"mbs": b}
    problems, sp = _problems(job, _parallel(job, sizes, sizes["tp"] > 1, "none"), b), sizes["tp"] > 1
    if sp and not problems:
        yield degrees | {"sp": False}, NO_SEQUENCE_PARALLELISM
    elif sp:  # without sequence parallelism the sequence length may be legal
        yield degrees | {"sp": True}, problems
        problems, sp = _problems(job, _parallel(job, sizes, False, "none"), b), False
    if problems:
        yield degrees | {"sp": sp}, problems
        return
    if sizes["dp"] * sizes["cp"] > 1:
        yield degrees | {"sp": sp, "zero": False}, PLAIN_OPTIMIZER
    for recompute in ("none", "selective", "full") if job.recompute == "auto" else (job.recompute,):
        plan = job.plan(_parallel(job, sizes, sp, recompute), b)
        yield degrees_of(plan), plan


def _parallel(job: Job, sizes: Degrees, sp: bool, recompute: str) -> ParallelConfig:
    shared = sizes["dp"] * sizes["cp"] > 1
    fields = dict(
        tensor_parallel_size=sizes["tp"],
        sequence_parallel=sp if sizes["tp"] > 1 else None,
        tp_comm_overlap=job.tp_comm_overlap and sp and sizes["tp"] <= LARGEST_OVERLAP,
        context_parallel_size=sizes["cp"],
        pipeline_parallel_size=sizes["pp"],
        virtual_pipeline_parallel_size=sizes["vpp"],
        pipeline_split=None,
        distributed_optimizer=True,
        overlap_grad_reduce=shared,
        overlap_param_gather=shared,
        recompute_granularity=recompute,
    )
    return ParallelConfig.model_validate(fields)


def _problems(job: Job, parallel: ParallelConfig, micro_batch_size: int) -> str:
    """Return in one line what the trainer's own checks (RunConfig, `check_world`) find; empty if nothing."""
    run = job.run(parallel, micro_batch_size)
    problems = run.section_problems() or world_problems(run.train, run.parallel, job.gpus)
    return "; ".join(f"{name}: {message}" for name, message in problems)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]
