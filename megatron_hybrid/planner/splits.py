"""Search over pipeline splits: layers move between virtual stages while the predicted step gets faster.

The default split (ParallelConfig.stage_layers) counts layers, and weighs the output layer by its FLOPs. The search weighs every
layer by its predicted time, and plays the schedule.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_hybrid.planner.plan import Plan

Split = tuple[int, ...]
"""Number of layers of each virtual stage, in model order."""
BEAM = 12
"""Number of splits, the best by the closed form, that are simulated in each round and from which the next round starts."""
PATIENCE = 3
"""Number of rounds without a faster split after which the search ends."""
LEAST_GAIN = 0.003
"""Share of the step that another split must save. A smaller gain is not worth a configuration that differs from the default."""


def with_split(plan: Plan, split: Split) -> Plan:
    """Return the plan with another `parallel.pipeline_split`."""
    return replace(plan, parallel=plan.parallel.model_copy(update={"pipeline_split": split}))


def faster_split(
    plan: Plan, estimate: Callable[[Plan], float], simulate: Callable[[Plan], float], fits: Callable[[Plan], bool]
) -> Plan:
    """Return the plan with the fastest split that a beam search over moves of single layers finds; the plan itself if none is faster.

    Args:
        estimate: seconds of a plan's step by the closed form of the schedule.
        simulate: seconds of a plan's step, event by event.
        fits: does the plan fit into the device's memory?
    """
    seconds, best = simulate(plan) * (1 - LEAST_GAIN), plan
    beam, seen, waited = [tuple(len(chunk.symbols) for chunk in plan.chunks)], set[Split](), 0
    while waited < PATIENCE and beam:
        moved = {split for one in beam for split in _moves(one)} - seen
        plans = sorted((with_split(plan, split) for split in sorted(moved)), key=estimate)[:BEAM]
        beam = [one.parallel.pipeline_split for one in plans if one.parallel.pipeline_split]
        seen |= set(beam)
        waited += 1
        for one in plans:
            if (found := simulate(one)) < seconds and fits(one):
                seconds, best, waited = found, one, 0
    return best


def _moves(split: Split) -> Iterator[Split]:
    """Yield the splits in which one layer has moved from one virtual stage to another."""
    for source, count in enumerate(split):
        if count == 1:
            continue
        for target in range(len(split)):
            if target != source:
                moved = list(split)
                moved[source] -= 1
                moved[target] += 1
                yield tuple(moved)
