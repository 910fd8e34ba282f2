"""Learning rate schedules: linear warm-up, then a decay to min_lr_ratio of the peak, or phases.

Steps are counted like updates: the first update is step 1, the last is train.steps. With w = warmup_steps, r =
min_lr_ratio and lr = optimizer.lr, the learning rate of step s is

    lr * min(warm-up, shape)        warm-up = s / w        (1 where w = 0)

    constant    shape = 1
    cosine      shape = r + (1 - r) * (1 + cos(pi * t)) / 2     t = (s - w) / (e - w) within [0, 1]
    linear      shape = r + (1 - r) * (1 - t)                   e = decay_steps, or train.steps
    wsd         shape = r + (1 - r) * (n - s) / d               n = train.steps, d = decay_steps, or decay_fraction * n
    wsd_s       as wsd with n = the first endpoint at or after s
    phases      shape = end + (start - end) * left(t)           t = share of the phase up to and including step s
                left(t) = 1 - t, (1 + cos(pi * t)) / 2, or 1 - sqrt(t)

Boundaries. Step w has exactly the peak. cosine and linear decay from step w + 1 on, reach r * lr at step e and stay there.
wsd holds the peak up to and including step n - d and reaches r * lr at step n. It stays there beyond n, when a run is
extended. wsd_s returns to the peak in the step after an endpoint. The last step of a phase has its end. constant ignores r. If
wsd's default decay begins during the warm-up, the smaller of the two values applies. As in OLMo-core, warm-up starts from 0, but
no step has a learning rate of 0, except where r or the end of a phase is 0.
"""

import math
from collections.abc import Sequence

from megatron_hybrid.config.schedule import PhaseConfig
from megatron_hybrid.config.train import TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Return the learning rate of update `step`; the first update is 1. It depends on nothing else, so resuming needs no state.

    Raises:
        ValueError: step below 1.
    """
    if step < 1:
        raise ValueError(f"step = {step}: the first update is step 1")
    warmup = train.schedule.warmup_steps
    rising = step / warmup if step < warmup else 1.0
    return train.optimizer.lr * min(rising, _shape(step, train))


def _shape(step: int, train: TrainConfig) -> float:
    """Return the decay factor of `step`, in [min_lr_ratio, 1]."""
    schedule = train.schedule
    floor = schedule.min_lr_ratio
    match schedule.kind:
        case "constant":
            return 1.0
        case "wsd" | "wsd_s":
            end = next((endpoint for endpoint in schedule.endpoints if endpoint >= step), train.steps)
            left = min(max(end - step, 0) / schedule.decay_before(end), 1.0)
            return floor + (1 - floor) * left
        case "phases":
            return _in_phases(step, schedule.phases)
        case "cosine" | "linear":
            end = schedule.decay_steps or train.steps
            if step >= end:
                return floor
            t = max(step - schedule.warmup_steps, 0) / (end - schedule.warmup_steps)
            return floor + (1 - floor) * _left(schedule.kind, t)


def _in_phases(step: int, phases: Sequence[PhaseConfig]) -> float:
    """Return the multiple of the peak in `step`."""
    for phase in phases:
        if step <= phase.steps:
            return phase.end + (phase.start - phase.end) * _left(phase.kind, step / phase.steps)
        step -= phase.steps
    return phases[-1].end


def _left(kind: str, t: float) -> float:
    """Return the share of a decay that is left after share `t` of its steps."""
    match kind:
        case "cosine":
            return (1 + math.cos(math.pi * t)) / 2
        case "sqrt":
            return 1 - math.sqrt(t)
        case _:
            return 1 - t
