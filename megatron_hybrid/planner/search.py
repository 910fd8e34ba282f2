"""Search over every layout of a job: legal ones ranked by predicted speed, others rejected with the reason."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.job import Job
from megatron_hybrid.planner.layouts import layouts
from megatron_hybrid.planner.memory import Memory, fullest
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.splits import faster_split
from megatron_hybrid.planner.timing import StepPredictor, StepTime

GB = 1e9
SIMULATED = 40
"""Number of best candidates whose pipeline schedule is simulated event by event."""
REFINED = 4
"""Number of best candidates whose pipeline split is searched, and which keep the delta rule's states where memory is left."""


@dataclass(frozen=True)
class Candidate:
    """Legal layout with its predictions."""

    plan: Plan
    memory: Memory
    step: StepTime
    need: float
    """Bytes of the device: tensors, fragmentation, libraries."""


@dataclass(frozen=True)
class Rejection:
    """Layout that is not considered, and the reason."""

    degrees: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class SearchResult:
    """Candidates, best first, and rejections."""

    job: Job
    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]


def search(job: Job) -> SearchResult:
    """Enumerate all layouts, reject those that are illegal or too large, and rank the others by predicted step time."""
    job = replace(job, model=_first_equal(job.model))
    predictor = StepPredictor(job.hardware)
    found: list[Candidate] = []
    rejected: list[Rejection] = []
    for degrees, outcome in layouts(job):
        if isinstance(outcome, str):
            rejected.append(Rejection(degrees, outcome))
            continue
        memory = fullest(outcome)
        need = device_bytes(memory, job.hardware)
        if need > job.hardware.memory_bytes:
            rejected.append(Rejection(degrees, _too_large(memory, need, job.hardware)))
            continue
        found.append(Candidate(outcome, memory, predictor.step(outcome), need))
    found.sort(key=_slowness)
    top = sorted((_candidate(c.plan, job, predictor) for c in found[:SIMULATED]), key=_slowness)
    top = sorted([*(_refined(c, job, predictor) for c in top[:REFINED]), *top[REFINED:]], key=_slowness)
    return SearchResult(job, (*top, *found[SIMULATED:]), tuple(rejected))


@lru_cache(maxsize=16)
def _first_equal(model: ModelConfig) -> ModelConfig:
    """Return the first of equal models. The planner's caches then find it by identity, and compare no fields."""
    return model


def _candidate(plan: Plan, job: Job, predictor: StepPredictor) -> Candidate:
    """Return the candidate of a plan, with its schedule simulated."""
    memory = fullest(plan)
    return Candidate(plan, memory, predictor.step(plan, simulated=True), device_bytes(memory, job.hardware))


def _refined(candidate: Candidate, job: Job, predictor: StepPredictor) -> Candidate:
    return _with_states(_with_faster_split(candidate, job, predictor), job, predictor)


def _with_states(candidate: Candidate, job: Job, predictor: StepPredictor) -> Candidate:
    """Return the candidate with the delta rule's states kept, if they fit. In FP8 that made a step slower (lab notes)."""
    parallel = candidate.plan.parallel
    if parallel.keeps_states or candidate.plan.precision.fp8:
        return candidate
    kept = parallel.model_copy(update={"keep_delta_rule_states": True})
    other = _candidate(replace(candidate.plan, parallel=kept), job, predictor)
    fits = other.need <= job.hardware.memory_bytes
    return other if fits and other.step.seconds < candidate.step.seconds else candidate


def _with_faster_split(candidate: Candidate, job: Job, predictor: StepPredictor) -> Candidate:
    if candidate.plan.pp == 1:
        return candidate
    plan = faster_split(
        candidate.plan,
        lambda plan: predictor.step(plan).seconds,
        lambda plan: predictor.step(plan, simulated=True).seconds,
        lambda plan: device_bytes(fullest(plan), job.hardware) <= job.hardware.memory_bytes,
    )
    return candidate if plan is candidate.plan else _candidate(plan, job, predictor)


def device_bytes(memory: Memory, hardware: Hardware) -> float:
    """Return the device memory that must be free."""
    return memory.total * hardware.factor("memory") * (1 + hardware.fragmentation) + hardware.reserved_bytes


def _slowness(candidate: Candidate) -> tuple[float, float]:
    return candidate.step.seconds, candidate.need


def _too_large(memory: Memory, need: float, hardware: Hardware) -> str:
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])[:2]
    most = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)
    return f"needs {need / GB:.1f} GB of {hardware.memory_bytes / GB:.1f} ({most})"
