"""Kills of a random rank at a random moment: the others end, and the run resumes bit-identical.

As tools/launch.py does, ranks that do not end by themselves within seconds are killed: they may wait for a rank that never joined.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults import run_state
from tests.faults.processes import Forked

STEPS, INTERVAL = 24, 4
KILLS_PER_RUN = 5
LIMIT_S, GRACE_S = 30.0, 6.0
"""Seconds in which the other ranks must end, and after which the launcher kills them."""


def run(part: Any, count: int) -> None:
    """Kill ranks `count` times, over all layouts in turn."""
    references: dict[str, tuple[dict[str, Any], float]] = {}
    layouts, killed = list(run_state.LAYOUTS), 0
    for number in range(10**6):
        if killed >= count:
            return
        layout = layouts[number % len(layouts)]
        if layout not in references:
            references[layout] = _undisturbed(part, layout)
        killed += _killed_run(part, layout, *references[layout], min(KILLS_PER_RUN, count - killed))


def _start(part: Any, layout: str, run_dir: Path) -> Forked:
    arguments = run_state.arguments(part.folder, run_dir, layout, STEPS, INTERVAL)
    return Forked(arguments, run_state.LAYOUTS[layout][0], part.folder / "log")


def _undisturbed(part: Any, layout: str) -> tuple[dict[str, Any], float]:
    """Return the outcome of a run that is not disturbed, and its seconds."""
    run_dir, begin = part.folder / f"{layout} undisturbed", time.monotonic()
    ranks = _start(part, layout, run_dir)
    codes = ranks.wait(120)
    part.expect(not any(codes), f"{layout} undisturbed: {codes} {ranks.text()[-300:]}")
    return run_state.outcome(run_dir), time.monotonic() - begin


def _killed_run(part: Any, layout: str, reference: dict[str, Any], seconds: float, most: int) -> int:
    """Kill a run up to `most` times, resume it to its end, and compare. Return the number of kills."""
    run_dir, killed = part.folder / f"{layout} killed {part.figures.get('runs', 0)}", 0
    part.count("runs")
    while killed < most and run_state.saved_step(run_dir) < STEPS:
        ranks = _start(part, layout, run_dir)
        victim = part.rng.randrange(len(ranks.pids))
        time.sleep(part.rng.uniform(0.05, seconds))
        if ranks.poll():
            ranks.wait(LIMIT_S)  # it had ended already
            break
        os.kill(ranks.pids[victim], signal.SIGKILL)
        at = time.monotonic()
        codes = ranks.wait(LIMIT_S, GRACE_S)
        took = max(ranks.ended.values()) - at
        part.count("ranks that the launcher had to kill", codes.count(None))
        part.expect(
            took < LIMIT_S, f"{layout}: rank {victim} killed, others did not end: {codes} {ranks.text()[-500:]}"
        )
        part.at_most("seconds until all ranks have ended, largest", took)
        killed += 1
    if run_state.saved_step(run_dir) < STEPS:
        ranks = _start(part, layout, run_dir)
        codes = ranks.wait(120)
        part.expect(not any(codes), f"{layout}: resume after kills: {codes} {ranks.text()[-500:]}")
    part.expect(run_state.outcome(run_dir) == reference, f"{layout}: the resumed run is not bit-identical")
    return max(killed, 1)
