"""Every layout of a training job: the legal ones ranked by predicted speed, the others with the reason why not."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config import checks
from megatron_hybrid.config.data import DataConfig, SourceConfig
from megatron_hybrid.config.parallel import LARGEST_OVERLAP, ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.memory import Memory, fullest
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.timing import StepPredictor, StepTime

GB = 1e9
PLAYED = 40
"""Candidates, from the top, whose schedule is played event by event."""
MOST_VIRTUAL, MOST_MICRO_BATCH = 8, 16
NO_SEQUENCE_PARALLELISM = (
    "as many bytes on the wire as with sequence parallelism, and the residual stream whole on every rank"
)
PLAIN_OPTIMIZER = (
    "as many bytes on the wire as with the distributed optimizer, and all of the optimizer's state on every rank"
)
SHORTEST_SLICE = 2048
"""Tokens of a sequence on a context parallel rank, below which it is not worth asking: latencies are most of it."""


@dataclass(frozen=True)
class Job:
    """What is to be trained, and on what."""

    model: ModelConfig
    gpus: int
    hardware: Hardware
    sequence_length: int
    global_batch_size: int
    dtype: str = "bf16"
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: str = "auto"
    """none, selective, full; auto: whichever is best."""
    tp_comm_overlap: bool = False
    """In the layouts that can have it. Its memory is predicted; its speed is not."""
    offload_fraction: float = 0.0
    """train.optimizer.offload_fraction. Memory is predicted with it; updates as if all of them were the device's."""
    base: RunConfig | None = None
    """The run that is planned for, whose other fields (train.batch_ramp, for one) the trainer checks too."""

    @classmethod
    def of(cls, run: RunConfig, gpus: int, hardware: Hardware, recompute: str = "auto") -> "Job":
        """Return the job that trains `run` on this many GPUs."""
        return cls(
            run.model, gpus, hardware, run.data.sequence_length, run.train.global_batch_size, run.train.dtype,
            run.precision, recompute, run.parallel.tp_comm_overlap, run.train.optimizer.offload_fraction, run,
        )  # fmt: skip

    def run(self, parallel: ParallelConfig, micro_batch_size: int) -> RunConfig:
        """Return the run under a layout, unchecked. Without a base, data and training are placeholders."""
        if self.base is not None:
            train = self.base.train.model_copy(update={"micro_batch_size": micro_batch_size})
            return self.base.model_copy(update={"parallel": parallel, "train": train})
        train = TrainConfig.model_construct(
            steps=1, global_batch_size=self.global_batch_size, micro_batch_size=micro_batch_size, dtype=self.dtype
        )
        data = DataConfig.model_construct(
            train=(SourceConfig.model_construct(path="none", dtype=None),),
            validation=(),
            sequence_length=self.sequence_length,
        )
        return RunConfig.model_construct(
            run_dir="runs/none", model=self.model, data=data, train=train, parallel=parallel, precision=self.precision
        )


@dataclass(frozen=True)
class Candidate:
    """A legal layout, predicted."""

    plan: Plan
    memory: Memory
    step: StepTime
    need: float
    """Bytes of the device: tensors, what the allocator cannot use, libraries."""


@dataclass(frozen=True)
class Rejection:
    """A layout that will not do, and why."""

    degrees: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class Answer:
    """Candidates, best first, and rejections."""

    job: Job
    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]


def degrees_of(plan: Plan) -> dict[str, Any]:
    """By the short names that --why takes."""
    return {
        "tp": plan.tp, "sp": plan.parallel.sequence_parallel_on, "cp": plan.cp, "pp": plan.pp, "vpp": plan.vpp, "dp": plan.dp,
        "mbs": plan.micro_batch_size, "recompute": plan.parallel.recompute_granularity, "zero": plan.parallel.distributed_optimizer,
    }  # fmt: skip


def search(job: Job) -> Answer:
    """Enumerate, reject, predict, rank."""
    clock, found, rejected = StepPredictor(job.hardware), [], []
    for degrees, outcome in _layouts(job):
        if isinstance(outcome, str):
            rejected.append(Rejection(degrees, outcome))
            continue
        memory = fullest(outcome)
        need = device_bytes(memory, job.hardware)
        if need > job.hardware.memory_bytes:
            rejected.append(Rejection(degrees, _too_large(memory, need, job.hardware)))
            continue
        found.append(Candidate(outcome, memory, clock.step(outcome), need))
    found.sort(key=_slowness)
    top = [replace(c, step=clock.step(c.plan, simulated=True)) for c in found[:PLAYED]]
    return Answer(job, tuple(sorted(top, key=_slowness) + found[PLAYED:]), tuple(rejected))


def device_bytes(memory: Memory, hardware: Hardware) -> float:
    """What a device must have free for it."""
    return memory.total * hardware.factor("memory") * (1 + hardware.fragmentation) + hardware.reserved_bytes


def _slowness(candidate: Candidate) -> tuple[float, float]:
    return candidate.step.seconds, candidate.need


def _too_large(memory: Memory, need: float, hardware: Hardware) -> str:
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])[:2]
    most = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)
    return f"needs {need / GB:.1f} GB of {hardware.memory_bytes / GB:.1f} ({most})"


def _layouts(job: Job) -> Iterator[tuple[dict[str, Any], Plan | str]]:
    """Every layout with its plan, or why it is not legal."""
    for tp in _divisors(job.gpus):
        if tp > job.hardware.gpus_per_node:
            yield (
                {"tp": tp},
                f"tensor parallelism over more than a node's {job.hardware.gpus_per_node} GPUs waits for the network",
            )
            continue
        for cp in _divisors(job.gpus // tp):
            if reason := _no_slices(job, tp, cp):
                yield {"tp": tp, "cp": cp}, reason
                continue
            yield from _pipelines(job, {"tp": tp, "cp": cp})


def _no_slices(job: Job, tp: int, cp: int) -> str:
    """Why sequences are not shared over so many ranks; empty if they may be."""
    length = job.sequence_length // cp
    if cp > 1 and length < SHORTEST_SLICE:
        return (
            f"context parallelism would leave a rank {length} tokens of a sequence: latencies would be most of the step"
        )
    run = job.run(_parallel(job, {"tp": tp, "cp": cp, "pp": 1, "vpp": 1, "dp": 1}, tp > 1, "none"), 1)
    found = checks.section_problems(run) if cp > 1 else ()
    return "; ".join(f"{name}: {message}" for name, message in found if name == "parallel.context_parallel_size")


def _pipelines(job: Job, degrees: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Plan | str]]:
    """Every pipeline, micro-batch and recomputation under these tensor and context parallel sizes."""
    left = job.gpus // (degrees["tp"] * degrees["cp"])
    for pp in _divisors(left):
        if pp > job.model.num_layers:
            yield degrees | {"pp": pp}, f"more pipeline ranks than the {job.model.num_layers} layers"
            continue
        dp = left // pp
        micro_batches = [b for b in _powers(MOST_MICRO_BATCH) if job.global_batch_size % (dp * b) == 0]
        if not micro_batches:
            reason = f"{dp} replicas do not divide the global batch of {job.global_batch_size} sequences"
            yield degrees | {"pp": pp, "dp": dp}, reason
            continue
        for vpp in range(1, (min(MOST_VIRTUAL, job.model.num_layers // pp) if pp > 1 else 1) + 1):
            for b in micro_batches:
                yield from _variants(job, degrees | {"pp": pp, "vpp": vpp, "dp": dp}, b)


def _variants(job: Job, sizes: dict[str, int], b: int) -> Iterator[tuple[dict[str, Any], Plan | str]]:
    """One set of degrees, with what goes without saying, and with each recomputation."""
    degrees: dict[str, Any] = sizes | {"mbs": b}
    problems, sp = _problems(job, _parallel(job, sizes, sizes["tp"] > 1, "none"), b), sizes["tp"] > 1
    if sp and not problems:
        yield degrees | {"sp": False}, NO_SEQUENCE_PARALLELISM
    elif sp:  # what sequence parallelism asks of the sequence may be all that is wrong
        yield degrees | {"sp": True}, problems
        problems, sp = _problems(job, _parallel(job, sizes, False, "none"), b), False
    if problems:
        yield degrees | {"sp": sp}, problems
        return
    if sizes["dp"] * sizes["cp"] > 1:
        yield degrees | {"sp": sp, "zero": False}, PLAIN_OPTIMIZER
    for recompute in ("none", "selective", "full") if job.recompute == "auto" else (job.recompute,):
        plan = Plan(
            job.model, _parallel(job, sizes, sp, recompute), job.gpus, job.sequence_length, b, job.global_batch_size,
            job.dtype, job.precision, job.offload_fraction,
        )  # fmt: skip
        yield degrees_of(plan), plan


def _parallel(job: Job, sizes: dict[str, int], sp: bool, recompute: str) -> ParallelConfig:
    shared = sizes["dp"] * sizes["cp"] > 1
    return ParallelConfig(
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


def _problems(job: Job, parallel: ParallelConfig, micro_batch_size: int) -> str:
    """What the trainer's own checks (RunConfig, `check_world`) say, in a line; empty if nothing."""
    run = job.run(parallel, micro_batch_size)
    problems = checks.section_problems(run) or checks.world_problems(run, job.gpus)
    return "; ".join(f"{name}: {message}" for name, message in problems)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]
