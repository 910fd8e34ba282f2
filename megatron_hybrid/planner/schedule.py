"""Pipeline schedules: the order in which a rank runs its forward and backward passes, and a step's time from it.

1F1B, and interleaved 1F1B with virtual stages, in megatron-core's order (pipeline_parallel/schedules.py). `simulate` plays a
step event by event; `analytic_seconds` is the closed form for equal stages that it is checked against.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Pass(NamedTuple):
    """One forward or backward pass of a micro-batch through a virtual stage."""

    forward: bool
    microbatch: int
    position: int
    """Of the virtual stage among its rank's."""


def warmup_passes(pp: int, vpp: int, microbatches: int, rank: int) -> int:
    """Forward passes of a rank before it alternates with backward passes."""
    if pp == 1:
        return 0
    count = pp - rank - 1 if vpp == 1 else 2 * (pp - rank - 1) + (vpp - 1) * pp
    return min(count, microbatches * vpp)


@lru_cache(maxsize=512)
def forward_order(pp: int, vpp: int, microbatches: int) -> tuple[tuple[int, int], ...]:
    """(micro-batch, position) of every forward pass: groups of `pp` micro-batches go through one virtual stage after the
    other. Backward passes come in the same order with the positions reversed."""
    groups = [range(at, min(at + pp, microbatches)) for at in range(0, microbatches, pp)]
    return tuple((m, position) for group in groups for position in range(vpp) for m in group)


@lru_cache(maxsize=2048)
def passes(pp: int, vpp: int, microbatches: int, rank: int) -> tuple[Pass, ...]:
    """All passes of a rank in order."""
    forwards = [Pass(True, m, position) for m, position in forward_order(pp, vpp, microbatches)]
    backwards = [Pass(False, m, vpp - 1 - position) for m, position in forward_order(pp, vpp, microbatches)]
    warmup = warmup_passes(pp, vpp, microbatches, rank)
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards):
        order += [forward, backward]
    return tuple(order + backwards[len(forwards) - warmup :])


@lru_cache(maxsize=4096)
def chunks_in_flight(pp: int, vpp: int, microbatches: int, rank: int) -> tuple[int, ...]:
    """Micro-batches whose activations each virtual stage of a rank holds when its first backward pass begins: the most."""
    count = min(warmup_passes(pp, vpp, microbatches, rank) + 1, microbatches * vpp)
    held = Counter(position for _, position in forward_order(pp, vpp, min(microbatches, 4 * pp))[:count])
    return tuple(held[position] for position in range(vpp))


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch, by virtual stage in model order, and of handing its activations on."""

    forward: Sequence[float]
    backward: Sequence[float]
    transfer: float = 0.0


@dataclass(frozen=True)
class Event:
    """A pass, when it ran and where."""

    rank: int
    stage: int
    step: Pass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step's passes on every pipeline rank."""

    events: tuple[Event, ...]
    seconds: float
    busy: tuple[float, ...]
    """By rank."""
    most_in_flight: tuple[int, ...]
    """By rank: micro-batches held at a time, those of each of its virtual stages counted."""

    @property
    def bubble(self) -> float:
        """The share of the step that the busiest rank waits."""
        return 1 - max(self.busy) / self.seconds


def simulate(times: StageTimes, pp: int, microbatches: int) -> Timeline:
    """Play a step: each rank runs its passes in order, each as soon as its input has arrived. Sending blocks nobody.

    Raises:
        ValueError: an interleaved schedule whose micro-batches are no multiple of pp.
    """
    stages = len(times.forward)
    vpp = stages // pp
    if vpp > 1 and microbatches % pp:
        raise ValueError(f"microbatches: {microbatches} is not a multiple of {pp} pipeline ranks")
    orders = [passes(pp, vpp, microbatches, rank) for rank in range(pp)]
    ends: dict[tuple[bool, int, int], float] = {}
    at, clock, busy, held = [0] * pp, [0.0] * pp, [0.0] * pp, [0] * pp
    most, events, waiting = [0] * pp, [], list(range(pp))
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
    assert all(i == len(order) for i, order in zip(at, orders)), "the schedule waits for itself"
    return Timeline(tuple(events), max(clock), tuple(busy), tuple(most))


def _ready(step: Pass, stage: int, stages: int, ends: dict, transfer: float) -> float | None:
    """When a pass's input is there; None: not yet known."""
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
    """m + (p - 1) / v micro-batches of the slowest rank: exact for equal stages and free transfers, and close to the
    truth for others. A transfer is waited for on the way in and out, 2 (p v - 1) of them in all."""
    stages = len(times.forward)
    vpp = stages // pp
    work = [sum(times.forward[rank::pp]) + sum(times.backward[rank::pp]) for rank in range(pp)]
    filling = (sum(work) - max(work)) / vpp if pp > 1 else 0.0
    return microbatches * max(work) + filling + 2 * (pp - 1) * times.transfer
