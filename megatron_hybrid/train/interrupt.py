"""Graceful shutdown: signal handling, agreement on the stopping step, crash-loop detection."""

import contextlib
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
from megatron_hybrid.launch.variables import restart_count

MOST_RESTARTS = 3
"""Restarts of one job that may follow each other without a new step."""
RECORD = "restarts.json"


class RestartError(UserError):
    """The job has restarted several times without a new step."""


class Interrupt:
    """Records that this process was asked to stop, and lets the ranks agree on the stopping step.

    A context manager, which handles the signals while it is entered. Signals may arrive on any rank, or on several ranks at
    different times. `agreed` gives the same answer on all ranks after the same step. If a tool has started a StopWatcher,
    that ends the process before the first step, and during a step that hangs.

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
        stop_signals.unblock_stop_signals()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number)

    def agreed(self) -> bool:
        """Return whether any rank had been asked to stop at the previous call. Every rank calls this once per step.

        The flags of a step are summed during the next step, by gloo on the CPU. So neither the host nor the GPU waits.
        """
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        stop = self._counted() > 0
        votes = torch.zeros(1, dtype=torch.int32, device="cpu")
        votes += self.received is not None
        self._votes = (votes, dist.all_reduce(votes, group=self._group, async_op=True))
        return stop

    def _counted(self) -> int:
        if self._votes is None:
            return 0
        votes, work = self._votes
        work.wait()
        return int(votes)

    def settle(self) -> None:
        """Wait for the votes of the last step. Do not call it after an error: other ranks may not have voted."""
        self._counted()
        self._votes = None


def check_restarts(run_dir: Path, step: int, env: Mapping[str, str] = os.environ) -> None:
    """Count how often this job has restarted without a new step; `step` is where it starts from now.

    Only restarts by SLURM, torchrun and megatron-hybrid launch count; starts by hand are not limited. Call it on one rank. The record
    is a file in run_dir. A record that cannot be read or written is reported, and does not end the run.

    Raises:
        RestartError: more than MOST_RESTARTS restarts in a row without a new step.
    """
    record = run_dir / RECORD
    try:
        _count_restart(record, step, restart_count(env), env.get("SLURM_JOB_ID", ""))
    except OSError as error:
        print(f"{record} cannot be read or written: {error.strerror}; this restart is not counted", flush=True)


def _count_restart(record: Path, step: int, restart: int, job: str) -> None:
    fruitless = 0
    last = _read_record(record) if restart > 0 else {}
    if (last.get("job"), last.get("step")) == (job, step):
        fruitless = last["restarts_without_a_step"] + 1
    if fruitless > MOST_RESTARTS:
        raise RestartError(
            f"{f'job {job}' if job else 'the run'} has restarted {MOST_RESTARTS} times without a step beyond {step}; find the "
            f"reason in the log of the attempts. After fixing it, submit the run again: it resumes from step {step}"
        )
    _write_record(record, {"job": job, "step": step, "restarts_without_a_step": fruitless})


def _write_record(record: Path, content: dict[str, Any]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    temporary = record.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(content) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, record)


def _read_record(record: Path) -> dict[str, Any]:
    """Return the record of the previous attempt; empty if there is none. A damaged record is reported and kept aside."""
    try:
        last: dict[str, Any] = json.loads(record.read_text())
        if type(last["restarts_without_a_step"]) is int:
            return last
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError):
        pass
    with contextlib.suppress(OSError):
        os.replace(record, record.with_suffix(".json.damaged"))
    print(
        f"{record} is damaged: restarts are counted from 0 again, and it is kept as {record.name}.damaged", flush=True
    )
    return {}
