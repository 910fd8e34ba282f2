"""Search over every layout of a job: legal ones ranked by predicted speed, others rejected with the reason."""

from dataclasses import dataclass, replace
from typing import Any

from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.job import Job
from megatron_hybrid.planner.layouts import layouts
from megatron_hybrid.planner.memory import Memory, fullest
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.timing import StepPredictor, StepTime

GB = 1e9
SIMULATED = 40
"""Number of best candidates whose pipeline schedule is simulated event by event."""


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
    top = [replace(c, step=predictor.step(c.plan, simulated=True)) for c in found[:SIMULATED]]
    return SearchResult(job, tuple(sorted(top, key=_slowness) + found[SIMULATED:]), tuple(rejected))


def device_bytes(memory: Memory, hardware: Hardware) -> float:
    """Return the device memory that must be free."""
    return memory.total * hardware.factor("memory") * (1 + hardware.fragmentation) + hardware.reserved_bytes


def _slowness(candidate: Candidate) -> tuple[float, float]:
    return candidate.step.seconds, candidate.need


def _too_large(memory: Memory, need: float, hardware: Hardware) -> str:
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])[:2]
    most = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)
    return f"needs {need / GB:.1f} GB of {hardware.memory_bytes / GB:.1f} ({most})"
