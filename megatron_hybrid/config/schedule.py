"""Learning rate schedule."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from megatron_hybrid.base.errors import Problems
from megatron_hybrid.base.section import Section


class PhaseConfig(Section):
    """A phase of a schedule: the learning rate moves from `start` to `end`, both multiples of optimizer.lr."""

    steps: PositiveInt
    """Steps of the phase."""
    kind: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the curve. sqrt: 1 - sqrt(share of the phase), which falls fast first. A constant phase has equal ends."""
    start: NonNegativeFloat = 1.0
    """Multiple of optimizer.lr before the phase's first step."""
    end: NonNegativeFloat = 1.0
    """Reached in the last step of the phase."""


class ScheduleConfig(Section):
    """Learning rate schedule: linear warm-up, then decay of the given kind to min_lr_ratio of the peak."""

    kind: Literal["cosine", "linear", "wsd", "wsd_s", "constant", "phases"] = "cosine"
    """wsd: peak, then a linear decay before the last step. wsd_s: such a decay before every endpoint, and the peak again after it.
    phases: what `phases` lists. Linear to zero is `linear` with min_lr_ratio 0."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly from 0 to its peak."""
    decay_steps: PositiveInt | None = None
    """cosine, linear: step at which the minimum is reached (None: the last). wsd, wsd_s: steps of a decay (None: decay_fraction)."""
    decay_fraction: float = Field(0.1, gt=0, le=1)
    """wsd, wsd_s: steps of a decay as a share of the steps up to its endpoint, where decay_steps is null."""
    endpoints: tuple[PositiveInt, ...] = Field((), strict=False)
    """wsd_s: steps at which a decay ends, besides train.steps. The model is then that of a finished shorter run, and is evaluated."""
    phases: tuple[PhaseConfig, ...] = Field((), strict=False)
    """phases: one after the other from step 1 on. A run that is extended beyond them keeps the last learning rate."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end of a decay, as a share of the peak."""

    def decay_before(self, endpoint: int) -> int:
        """Return the steps of the decay that ends at `endpoint`, for wsd and wsd_s."""
        return self.decay_steps or max(1, round(endpoint / (1 / self.decay_fraction)))


def check_schedule(schedule: ScheduleConfig, steps: int, problems: Problems) -> None:
    """Check a schedule against the number of steps of the run."""
    kind, warmup, decay = schedule.kind, schedule.warmup_steps, schedule.decay_steps
    if warmup >= steps:
        problems.add("schedule.warmup_steps", f"{warmup} is not below train.steps = {steps}; give at most {steps - 1}")
        return
    _check_lists(schedule, steps, problems)
    if decay is None:
        return
    if kind in ("constant", "phases"):
        problems.add(
            "schedule.decay_steps",
            f"{decay} has no meaning for a {kind} schedule; set it to null, or kind to linear",
        )
    elif kind == "wsd" and decay > steps - warmup:
        problems.add(
            "schedule.decay_steps",
            f"{decay} steps of decay after warmup_steps = {warmup} do not fit into train.steps = {steps}; "
            f"give at most {steps - warmup}",
        )
    elif kind in ("cosine", "linear") and decay <= warmup:
        problems.add(
            "schedule.decay_steps",
            f"{decay} is not after warmup_steps = {warmup}; give at least {warmup + 1}, or null",
        )


def _check_lists(schedule: ScheduleConfig, steps: int, problems: Problems) -> None:
    """Check `endpoints` and `phases`, which belong to one kind each."""
    for name, kind in (("endpoints", "wsd_s"), ("phases", "phases")):
        if getattr(schedule, name) and schedule.kind != kind:
            problems.add(
                f"schedule.{name}",
                f"belong to kind {kind}, and kind is {schedule.kind}; set them to [], or kind to {kind}",
            )
    if schedule.kind == "phases":
        covered = sum(phase.steps for phase in schedule.phases)
        if covered < steps:
            problems.add(
                "schedule.phases",
                f"have {covered} steps, and train.steps is {steps}; add a phase of {steps - covered} steps, or lengthen one",
            )
        return
    before = schedule.warmup_steps
    for endpoint in (*schedule.endpoints, steps) if schedule.kind == "wsd_s" else ():
        if endpoint > steps:
            problems.add(
                "schedule.endpoints", f"{endpoint} is above train.steps = {steps}; remove it, or give more steps"
            )
        elif endpoint - schedule.decay_before(endpoint) < before and endpoint != before:
            problems.add(
                "schedule.endpoints",
                f"the decay of {schedule.decay_before(endpoint)} steps before {endpoint} begins before step {before}, where the "
                "warm-up or the decay before it ends; give endpoints in ascending order with room for the decay, or less of it",
            )
        before = endpoint
