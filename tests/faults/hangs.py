"""Ranks that are stopped or do not respond: the run ends in time, prints stacks, and names the rank that lags."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.faults import run_state
from tests.faults.processes import Forked

TIMEOUT_S, SLACK_S = 5.0, 10.0
REQUEUE = 75


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold_the_gil() -> None:
    ctypes.PyDLL(None).sleep(300)


CASES: tuple[tuple[str, str, str, Callable[[], None], str], ...] = (
    ("TP2", "step", "stopped", _stop, "rank 1 on {host} sent no report"),
    ("DP2", "data", "busy", lambda: time.sleep(300), "rank 1 on {host} lags"),
    ("PP2", "step", "stopped", _stop, "rank 1 on {host} sent no report"),
    ("TP2 x DP2", "step", "stopped", _stop, "rank 1 on {host} sent no report"),
    ("DP2", "evaluation", "stopped", _stop, "rank 1 on {host} sent no report"),
    ("TP2", "save", "stopped", _stop, "rank 1 on {host} sent no report"),
    ("DP2", "step", "holding the GIL", _hold_the_gil, "rank 1 on {host} sent no report"),
    ("one rank", "step", "holding the GIL", _hold_the_gil, "Timeout"),
)
"""Layout, phase, description, what the last rank (rank 1 of several) does then, and what is printed."""


def run(part: Any, count: int) -> None:
    """Run the first `count` cases."""
    for number, (layout, phase, how, act, says) in enumerate(CASES[:count]):
        size = run_state.LAYOUTS[layout][0]
        fields = {"train.hang_timeout": TIMEOUT_S, "train.start_timeout": 60}
        arguments = run_state.arguments(part.folder, part.folder / str(number), layout, 1000, 6, **fields)
        mark = part.folder / f"{number}.began"
        lagging = min(1, size - 1)
        ranks = Forked(arguments, size, part.folder / "log", partial(_act_on, lagging, phase, act, mark))
        _until(mark.exists, 90)
        began = time.monotonic()
        codes = ranks.wait(TIMEOUT_S + SLACK_S)
        seconds, text = time.monotonic() - began, ranks.text()
        name = f"{layout}, {how} in {phase}"
        healthy = [code for rank, code in enumerate(codes) if rank != lagging] or codes
        part.expect(set(healthy) == {REQUEUE}, f"{name}: {codes} after {seconds:.0f} s: {text[-600:]}")
        part.expect(codes[lagging] is not None, f"{name}: the rank that hangs is left")
        part.expect('File "' in text, f"{name}: no stack")
        part.expect(says.format(host=os.uname().nodename) in text, f"{name}: not named: {text[-600:]}")
        part.at_most("seconds from the hang to the end beyond the timeout, largest", seconds - TIMEOUT_S)


def _act_on(lagging: int, phase: str, act: Callable[[], None], mark: Any, rank: int) -> None:
    """Make one rank act when it enters a phase after some steps."""
    if rank != lagging:
        return
    from megatron_hybrid.checkpoint import manager
    from megatron_hybrid.data.loader import BatchLoader
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    owner, name, calls = {
        "step": (MegatronEngine, "forward_backward", 8),
        "data": (BatchLoader, "_take", 20),
        "evaluation": (MegatronEngine, "evaluate", 2),
        "save": (manager, "write_rank", 1),
    }[phase]
    original, seen = getattr(owner, name), [0]

    def entered(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == calls:
            mark.touch()
            act()
        return original(*args, **kwargs)

    setattr(owner, name, entered)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
