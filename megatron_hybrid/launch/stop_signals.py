"""Requests to stop: SIGTERM, SIGUSR1 and Ctrl-C, heeded within seconds wherever the main thread is. No torch here.

Python runs signal handlers in the main thread, between two bytecodes: not while that thread waits in C++ for other ranks.
The interpreter writes the number of each signal to a file descriptor at once, though (`signal.set_wakeup_fd`), and a
thread that reads from it can end the process.

Before the first step has been made there is nothing to save: the process ends. Later the signal is noted, and the loop
saves after the step it is in (train/interrupt.py). A step that does not end, since a rank hangs, ends the process too.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from megatron_hybrid.base.errors import INTERRUPTED, REQUEUE

REPEAT_S = 2.0
"""A Ctrl-C that follows another request sooner is the same one: launchers forward what the terminal has sent to all."""
PATIENCE_S = 60.0
"""Time that a step may still take after a request, if no step before took a tenth of it."""
PATIENCE_STEPS = 10
_TICK_S = 0.5


def asks_to_stop() -> list[signal.Signals]:
    """Return the signals that ask a run to stop: SLURM's warning before the time limit, what ends a process on preemption
    or shutdown, and Ctrl-C, unless this process was started to ignore it, as shells start background jobs of scripts."""
    interactive = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    return [signal.SIGUSR1, signal.SIGTERM, *([signal.SIGINT] if interactive else [])]


class StopWatcher(threading.Thread):
    """A thread that sees requests to stop at once, and ends the process where the main thread cannot, or need not, heed them.

    Attributes:
        doing: what the process does now, for the message.
        step: the last step made.
        saved_step: returns the step that a restart would resume from.
    """

    def __init__(self) -> None:
        super().__init__(name="stop signals", daemon=True)
        self.doing = "starting"
        self.step = 0
        self.saved_step: Callable[[], int] = lambda: 0
        self._training = False
        self._step_began: float | None = None
        self._longest = 0.0
        self._asked: tuple[signal.Signals, float] | None = None
        self._numbers, end = os.pipe()
        os.set_blocking(end, False)
        for signum in asks_to_stop():
            signal.signal(signum, _nothing)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # tools/launch.py starts ranks with it blocked

    def run(self) -> None:
        """Wait for signals, and for the end of a step once one has come."""
        while True:
            ready, _, _ = select.select([self._numbers], [], [], None if self._asked is None else _TICK_S)
            for number in os.read(self._numbers, 64) if ready else b"":
                if number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                    self._heed(signal.Signals(number))
            self._end_a_step_that_hangs()

    def begin_step(self, step: int) -> None:
        """Note that a step begins after `step` steps. The first one of a process leaves nothing to lose."""
        self.step, self._step_began = step, time.monotonic()
        self.doing = f"making step {step + 1}"

    def end_step(self, step: int) -> None:
        """Note that step `step` was made on all ranks: from now on there is something to save."""
        assert self._step_began is not None
        self._longest = max(self._longest, time.monotonic() - self._step_began)
        self.step, self._step_began, self._training = step, None, True

    def _heed(self, signum: signal.Signals) -> None:
        now = time.monotonic()
        if not self._training:
            again = "nothing was there to save, and nothing is lost; run the same command again"
            _end(_status(signum), f"asked to stop by {signum.name} while {self.doing}: {again}")
        elif self._asked is None:
            self._asked = signum, now
            if signum == signal.SIGINT:
                _say("asked to stop by Ctrl-C: saving after this step; a second Ctrl-C ends at once and saves nothing")
        elif signum == signal.SIGINT and now - self._asked[1] > REPEAT_S:
            _end(INTERRUPTED, f"ended at once by a second Ctrl-C: {self._lost()}")

    def _end_a_step_that_hangs(self) -> None:
        began = self._step_began
        if self._asked is None or began is None:
            return
        signum, asked = self._asked
        waited = time.monotonic() - max(began, asked)
        if waited > max(PATIENCE_S, PATIENCE_STEPS * self._longest):
            words = f"asked to stop by {signum.name}, and step {self.step + 1} has not ended within {waited:.0f} s"
            _end(_status(signum), f"{words}: another rank hangs or is gone. Ended without a save: {self._lost()}")

    def _lost(self) -> str:
        saved = self.saved_step()
        if saved >= self.step:
            return f"step {saved} is saved, and only what came after it is lost"
        return f"what came after step {saved} is lost, {self.step - saved} steps; the same command resumes from step {saved}"


watcher: StopWatcher | None = None
"""This process's, where a tool has started it."""


def watch() -> None:
    """Heed requests to stop from now on, in this process. Tools call it first; what is imported as a library does not."""
    global watcher
    watcher = StopWatcher()
    watcher.start()


def now_doing(what: str) -> None:
    """Say what the process does, for the message of a request to stop: `waiting for the other ranks`."""
    if watcher is not None:
        watcher.doing = what


def _nothing(signum: int, frame: FrameType | None) -> None:
    """A handler, without which Python would write no number."""


def _status(signum: signal.Signals) -> int:
    """Ctrl-C ends a run permanently; the others come from a batch system, which may start the run again."""
    return INTERRUPTED if signum == signal.SIGINT else REQUEUE


def _say(text: str) -> None:
    """Write a line, on the first rank of each node; without Python's buffers, whose lock another thread may hold."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{Path(sys.argv[0]).stem}: {text}\n".encode())


def _end(status: int, text: str) -> None:
    """End the process from this thread. Exit handlers would wait for the other ranks."""
    _say(text)
    flushing = threading.Thread(
        target=sys.stdout.flush, daemon=True
    )  # a reader that is gone or stuck must not hold it up
    flushing.start()
    flushing.join(1.0)
    os._exit(status)
