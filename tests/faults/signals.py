"""Signals in all phases of a run, to ranks and launchers, once and twice: every rank saves the same step, and none stays."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import run_state
from tests.faults.processes import Forked, Launched

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PHASES = ("start-up", "data check", "training", "evaluation", "save")
STEPS, INTERVAL = 24, 6
REQUEUE = 75
ENDLESS = 100_000
"""Steps of runs that only a signal ends."""


def run(part: Any, count: int) -> None:
    """Send `count` signals: two thirds inside a phase of forked ranks, one third at a random moment of launched runs."""
    references: dict[str, dict[str, Any]] = {}
    for number in range(count):
        if number % 3 < 2:
            layout = ("one rank", "TP2", "DP2", "PP2")[number // 3 % 4]
            if layout not in references:
                references[layout] = _undisturbed(part, layout)
            phase = PHASES[number // 2 % len(PHASES)]
            _inside(part, layout, phase, NUMBERS[number % 3], number // 5 % 2 == 1, number, references[layout])
        else:
            _launched(part, ("launch", "torchrun")[number // 3 % 2], NUMBERS[number // 6 % 3], number)


def _undisturbed(part: Any, layout: str) -> dict[str, Any]:
    run_dir = part.folder / f"{layout} undisturbed"
    arguments = run_state.arguments(part.folder, run_dir, layout, STEPS, INTERVAL)
    codes = Forked(arguments, run_state.LAYOUTS[layout][0], part.folder / "log").wait(120)
    part.expect(not any(codes), f"{layout} undisturbed: {codes}")
    return run_state.outcome(run_dir)


def _inside(part: Any, layout: str, phase: str, number: int, twice: bool, case: int, reference: dict[str, Any]) -> None:
    """Signal one rank inside a phase, then resume and compare."""
    run_dir, size = part.folder / str(case), run_state.LAYOUTS[layout][0]
    arguments = run_state.arguments(part.folder, run_dir, layout, STEPS, INTERVAL)
    target = part.rng.randrange(size)
    ranks = Forked(arguments, size, part.folder / "log", lambda rank: _signal_in(phase, number, twice, rank == target))
    codes = ranks.wait(60, grace=5.0)
    name = f"{signal.Signals(number).name}{' twice' if twice else ''} to rank {target} of {layout} in {phase}"
    trains = phase in PHASES[2:]
    expected = {REQUEUE} if trains else {REQUEUE, None, 1}  # before training, the launcher ends the others
    part.expect(REQUEUE in codes and set(codes) <= expected, f"{name}: {codes} {ranks.text()[-400:]}")
    part.expect("Traceback" not in ranks.text() or not trains, f"{name}: traceback")
    part.expect(run_state.saved_step(run_dir) == run_state.logged_step(run_dir), f"{name}: a logged step is not saved")
    part.expect((run_state.saved_step(run_dir) > 0) == trains, f"{name}: saved step {run_state.saved_step(run_dir)}")
    part.count(f"in {phase}")
    codes = Forked(arguments, size, part.folder / "log").wait(120)
    part.expect(not any(codes), f"{name}: resume: {codes}")
    part.expect(
        not any(codes) and run_state.outcome(run_dir) == reference, f"{name}: not bit-identical after the resume"
    )


def _signal_in(phase: str, number: int, twice: bool, is_target: bool) -> None:
    """Make this process signal itself when it enters a phase."""
    if not is_target:
        return

    def send() -> None:
        os.kill(os.getpid(), number)
        if twice:
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()

    module, name, calls = _entry(phase)
    original, seen = getattr(module, name), [0]

    def entered(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == calls:
            send()
        return original(*args, **kwargs)

    setattr(module, name, entered)


def _entry(phase: str) -> tuple[Any, str, int]:
    """Return the function that begins a phase, and the call at which to signal."""
    from megatron_hybrid.checkpoint.manager import CheckpointManager
    from megatron_hybrid.train import trainer
    from megatron_hybrid.train.callbacks.periodic_evaluation import PeriodicEvaluation
    from megatron_hybrid.train.data_check import StoreTeam

    return {
        "start-up": (trainer, "start_distributed", 1),
        "data check": (StoreTeam, "together", 1),
        "training": (trainer.Trainer, "step", 5),
        "evaluation": (PeriodicEvaluation, "evaluate", 2),
        "save": (CheckpointManager, "save", 1),
    }[phase]


def _launched(part: Any, launcher: str, number: int, case: int) -> None:
    """Signal a launcher, or one of its ranks, at a random moment from its imports to training."""
    run_dir = part.folder / str(case)
    arguments = run_state.arguments(part.folder, run_dir, "DP2", ENDLESS, ENDLESS)
    run = Launched(launcher, arguments, 2, part.folder / "log")
    after_steps = part.rng.choice((0, 0, 3, 8))
    _wait_for(lambda: run_state.logged_step(run_dir) >= after_steps, 90)
    time.sleep(part.rng.uniform(0.5, 6.0) if after_steps == 0 else part.rng.uniform(0.0, 0.5))
    pids, to_rank = run.ranks(), part.rng.random() < 0.4
    pid = pids[part.rng.choice(sorted(pids))] if to_rank and pids else run.process.pid
    name = f"{signal.Signals(number).name} to {'a rank' if pid != run.process.pid else 'the launcher'} of {launcher}"
    for _ in range(part.rng.choice((1, 2))):
        _kill(pid, number)
        time.sleep(0.1)
    code = run.wait(60)
    _wait_for(lambda: not run.ranks(), 15)  # those of torchrun end by themselves after it
    text, left = run.text(), run.end()
    part.expect(left == 0, f"{name}: {left} ranks are left {text[-300:]}")
    part.expect(code == REQUEUE if launcher == "launch" else code is not None, f"{name}: status {code} {text[-400:]}")
    saved, logged = run_state.saved_step(run_dir), run_state.logged_step(run_dir)
    part.expect(saved == logged or logged <= 1, f"{name}: saved step {saved}, logged step {logged} {text[-400:]}")
    part.count(f"to {launcher} or its ranks")


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _kill(pid: int, number: int) -> None:
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, number)
