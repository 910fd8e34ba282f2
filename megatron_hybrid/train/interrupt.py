"""Graceful shutdown: signal handling, agreement on the stopping step, crash-loop detection."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.launch import stop_signals

MOST_RESTARTS = 3
"""Restarts of one job that may follow each other without a new step."""
RECORD = "restarts.json"


class RestartError(UserError):
    """The job has restarted several times and stands where it stood."""


class Interrupt:
    """Notes that this process was asked to stop, and lets the ranks agree on when.

    A context manager: the signals are handled inside it. They arrive on any rank, or on several at different moments;
    `agreed` answers the same on all of them after the same step. Where a tool has started a StopWatcher, that ends the
    process before the first step, at a second Ctrl-C, and in a step that hangs.

    Args:
        saved_step: returns the step that a restart would resume from.
    """

    def __init__(self, saved_step: Callable[[], int] = lambda: 0) -> None:
        if stop_signals.watcher is not None:
            stop_signals.watcher.saved_step = saved_step
        self.received: signal.Signals | None = None
        self._group: dist.ProcessGroup | None = None
        self._votes: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> "Interrupt":
        numbers = stop_signals.asks_to_stop()
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # tools/launch.py starts ranks with SIGUSR1 blocked
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)

    def begin_step(self, step: int) -> None:
        """Note that a step begins after `step` steps."""
        if stop_signals.watcher is not None:
            stop_signals.watcher.begin_step(step)

    def agreed(self, step: int | None = None) -> bool:
        """Return whether any rank had been asked to stop when this was called the last time. Every rank calls it once per step.

        The flags of a step are added up in the background of the next one, by gloo on the CPU: nothing waits for them, least
        of all a GPU.

        Args:
            step: the step that was just made.
        """
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        stop = self._counted() > 0
        votes = torch.zeros(1, dtype=torch.int32, device="cpu")
        votes += self.received is not None
        self._votes = (votes, dist.all_reduce(votes, group=self._group, async_op=True))
        if step is not None and stop_signals.watcher is not None:
            stop_signals.watcher.end_step(step)
        return stop

    def _counted(self) -> int:
        if self._votes is None:
            return 0
        votes, work = self._votes
        work.wait()
        return int(votes)

    def settle(self) -> None:
        """Wait for the last votes: every rank has cast them when the loop is over. Not after an error."""
        self._counted()
        self._votes = None


def check_restarts(run_dir: Path, step: int, env: Mapping[str, str] = os.environ) -> None:
    """Count how often this SLURM job has restarted without a new step; `step` is where it starts from now.

    Only SLURM's own restarts count (SLURM_RESTART_COUNT): who starts a run by hand may do so as often as they like. On one
    rank; keeps its record in run_dir.

    Raises:
        RestartError: MOST_RESTARTS in a row have made none.
    """
    record = run_dir / RECORD
    restart, job = int(env.get("SLURM_RESTART_COUNT") or 0), env.get("SLURM_JOB_ID", "")
    vain = 0
    last = _read_record(record) if restart > 0 else {}
    if (last.get("job"), last.get("step")) == (job, step):
        vain = last["restarts_without_a_step"] + 1
    if vain > MOST_RESTARTS:
        raise RestartError(
            f"job {job} has restarted {MOST_RESTARTS} times without a step beyond {step}; the log of the attempts tells "
            f"why. When it is put right, submit the run again: it goes on from step {step}"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = record.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps({"job": job, "step": step, "restarts_without_a_step": vain}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, record)


def _read_record(record: Path) -> dict[str, Any]:
    """Return the record of the attempt before; empty where there is none. A damaged one is reported and ignored."""
    try:
        last = json.loads(record.read_text())
        if type(last["restarts_without_a_step"]) is int:
            return last
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError):
        pass
    print(f"{record} is damaged: restarts are counted from 0 again", flush=True)
    return {}
