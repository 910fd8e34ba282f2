"""Pipeline schedules: the order of a rank's forward and backward passes, and the time of a step.

1F1B and interleaved 1F1B, in megatron-core's order (pipeline_parallel/schedules.py). `simulate` plays a step event by event.
`analytic_seconds` is the closed form, which is exact for equal stages.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Pass(NamedTuple):
    """One forward or backward pass of a micro-batch through a virtual stage."""

    forward: bool
    microbatch: int
    position: int
    """Place of the virtual stage among its rank's."""


def warmup_passes(pp: int, vpp: int, microbatches: int, rank: int) -> int:
    """Return the number of forward passes before a rank alternates forward and backward passes."""
    if pp == 1:
        return 0
    count = pp - rank - 1 if vpp == 1 else 2 * (pp - rank - 1) + (vpp - 1) * pp
    return min(count, microbatches * vpp)


@lru_cache(maxsize=512)
def forward_order(pp: int, vpp: int, microbatches: int) -> tuple[tuple[int, int], ...]:
    """Return (micro-batch, position) of every forward pass.

    Groups of `pp` micro-batches go through one virtual stage after the other. Backward passes run in the same order with the
    positions reversed.
    """
    groups = [range(at, min(at + pp, microbatches)) for at in range(0, microbatches, pp)]
    return tuple((m, position) for group in groups for position in range(vpp) for m in group)


@lru_cache(maxsize=2048)
def passes(pp: int, vpp: int, microbatches: int, rank: int) -> tuple[Pass, ...]:
    """Return all passes of a rank in order."""
    forwards = [Pass(True, m, position) for m, position in forward_order(pp, vpp, microbatches)]
    backwards = [Pass(False, m, vpp - 1 - position) for m, position in forward_order(pp, vpp, microbatches)]
    warmup = warmup_passes(pp, vpp, microbatches, rank)
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards):
        order += [forward, backward]
    return tuple(order + backwards[len(forwards) - warmup :])


@lru_cache(maxsize=4096)
def chunks_in_flight(pp: int, vpp: int, microbatches: int, rank: int) -> tuple[int, ...]:
    """Return the most micro-batches whose activations each virtual stage of a rank holds: at the rank's first backward pass."""
    count = min(warmup_passes(pp, vpp, microbatches, rank) + 1, microbatches * vpp)
    held = Counter(position for _, position in forward_order(pp, vpp, min(microbatches, 4 * pp))[:count])
    return tuple(held[position] for position in range(vpp))


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch by virtual stage in model order, and of sending its activations to the next stage."""

    forward: Sequence[float]
    backward: Sequence[float]
    transfer: float = 0.0


@dataclass(frozen=True)
class Event:
    """Pass with its place and time."""

    rank: int
    stage: int
    step: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Passes of a step on every pipeline rank."""

    events: tuple[Event, ...]
    seconds: float
    busy: tuple[float, ...]
    """Seconds by rank."""
    most_in_flight: tuple[int, ...]
    """Most micro-batches held at a time by rank, summed over its virtual stages."""

    @property
    def bubble(self) -> float:
        """Share of the step in which the busiest rank waits."""
        return 1 - max(self.busy) / self.seconds


def simulate(times: StageTimes, pp: int, microbatches: int) -> Timeline:
    """Play a step: each rank runs its passes in order, each as soon as its input has arrived. Sends do not block.

    Raises:
        ValueError: the schedule is interleaved, and the micro-batches are not a multiple of pp.
    """
    stages = len(times.forward)
    vpp = stages // pp
    if vpp > 1 and microbatches % pp:
        raise ValueError(f"microbatches: {microbatches} is not a multiple of {pp} pipeline ranks")
    orders = [passes(pp, vpp, microbatches, rank) for rank in range(pp)]
    ends: dict[tuple[bool, int, int], float] = {}
    at, clock, busy, held = [0] * pp, [0.0] * pp, [0.0] * pp, [0] * pp
    most, waiting = [0] * pp, list(range(pp))
    events: list[Event] = []
    while waiting:
        rank = waiting.pop()
        while at[rank] < len(orders[rank]):
            step = orders[rank][at[rank]]
            stage = step.position * pp + rank
            ready = _ready(step, stage, stages, ends, times.transfer)
            if ready is None:
                break
            start = max(clock[rank], ready)
            seconds = (times.forward if step.forward else times.backward)[stage]
            clock[rank] = start + seconds
            busy[rank] += seconds
            held[rank] += 1 if step.forward else -1
            most[rank] = max(most[rank], held[rank])
            ends[step.forward, step.microbatch, stage] = clock[rank]
            events.append(Event(rank, stage, step, start, clock[rank]))
            at[rank] += 1
            waiting += [r for r in ((rank + 1) % pp, (rank - 1) % pp) if r != rank and r not in waiting]
    assert all(i == len(order) for i, order in zip(at, orders)), "deadlock in the schedule"
    return Timeline(tuple(events), max(clock), tuple(busy), tuple(most))


def _ready(
    step: Pass, stage: int, stages: int, ends: Mapping[tuple[bool, int, int], float], transfer: float
) -> float | None:
    """Return the time at which a pass's input arrives. None: not yet known."""
    if step.forward:
        return 0.0 if stage == 0 else _arrival(ends.get((True, step.microbatch, stage - 1)), transfer)
    own = ends.get((True, step.microbatch, stage))
    if own is None or stage == stages - 1:
        return own
    after = _arrival(ends.get((False, step.microbatch, stage + 1)), transfer)
    return None if after is None else max(own, after)


def _arrival(end: float | None, transfer: float) -> float | None:
    return None if end is None else end + transfer


def analytic_seconds(times: StageTimes, pp: int, microbatches: int) -> float:
    """Return the time of m + (p - 1) / v micro-batches of the slowest rank, and of the transfers while the pipeline fills and drains.

    This is exact for equal stages and free transfers, and close to the simulation otherwise.
    """
    stages = len(times.forward)
    vpp = stages // pp
    work = [sum(times.forward[rank::pp]) + sum(times.backward[rank::pp]) for rank in range(pp)]
    filling = (sum(work) - max(work)) / vpp if pp > 1 else 0.0
    return microbatches * max(work) + filling + 2 * (pp - 1) * times.transfer
