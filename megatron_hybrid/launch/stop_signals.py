"""Requests to stop: react to SIGTERM, SIGUSR1 and Ctrl-C within seconds. No torch here.

Python runs signal handlers in the main thread between two bytecodes, so not while that thread waits in C++ for other ranks. But
the interpreter immediately writes the number of each signal to a file descriptor (`signal.set_wakeup_fd`), and a thread that
reads it can end the process.

Before the first step is finished there is nothing to save, and the process ends. Later, the training loop saves after the current step
(train/interrupt.py). The process also ends if the current step does not end because a rank hangs.
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
"""Seconds within which a second Ctrl-C counts as the first: launchers forward a signal that the terminal has sent to all."""
PATIENCE_S = 60.0
"""Seconds that a step may take after a request, or PATIENCE_STEPS times the longest step, if that is longer."""
PATIENCE_STEPS = 10
_TICK_S = 0.5


def asks_to_stop() -> list[signal.Signals]:
    """Return the signals that ask a run to stop.

    SIGUSR1 is SLURM's warning before the time limit. SIGTERM comes on preemption and shutdown. SIGINT is Ctrl-C; it is left out
    if this process ignores it, as background jobs of shell scripts do.
    """
    interactive = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    return [signal.SIGUSR1, signal.SIGTERM, *([signal.SIGINT] if interactive else [])]


class StopWatcher(threading.Thread):
    """Thread that receives requests to stop, and ends the process if the main thread cannot or need not react.

    Attributes:
        doing: current activity of the process, for messages.
        step: last finished step.
        saved_step: returns the step from which a restart would resume.
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
        """Wait for signals, and after a signal for the end of the current step."""
        while True:
            ready, _, _ = select.select([self._numbers], [], [], None if self._asked is None else _TICK_S)
            for number in os.read(self._numbers, 64) if ready else b"":
                if number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                    self._react(signal.Signals(number))
            self._end_hanging_step()

    def begin_step(self, step: int) -> None:
        """Record that a step begins after `step` steps. Until the first step ends, there is nothing to save."""
        self.step, self._step_began = step, time.monotonic()
        self.doing = f"running step {step + 1}"

    def end_step(self, step: int) -> None:
        """Record that step `step` has ended on all ranks. From now on there is something to save."""
        assert self._step_began is not None
        self._longest = max(self._longest, time.monotonic() - self._step_began)
        self.step, self._step_began, self._training = step, None, True

    def _react(self, signum: signal.Signals) -> None:
        now = time.monotonic()
        if not self._training:
            again = "there was nothing to save, and nothing is lost; run the same command again"
            _end(_status(signum), f"asked to stop by {signum.name} while {self.doing}: {again}")
        elif self._asked is None:
            self._asked = signum, now
            if signum == signal.SIGINT:
                _say("asked to stop by Ctrl-C: saving after this step; a second Ctrl-C ends at once and saves nothing")
        elif signum == signal.SIGINT and now - self._asked[1] > REPEAT_S:
            _end(INTERRUPTED, f"ended at once by a second Ctrl-C: {self._lost()}")

    def _end_hanging_step(self) -> None:
        began = self._step_began
        if self._asked is None or began is None:
            return
        signum, asked = self._asked
        waited = time.monotonic() - max(began, asked)
        if waited > max(PATIENCE_S, PATIENCE_STEPS * self._longest):
            words = f"asked to stop by {signum.name}, and step {self.step + 1} has not ended within {waited:.0f} s"
            _end(_status(signum), f"{words}: another rank hangs or has ended. Ended without saving: {self._lost()}")

    def _lost(self) -> str:
        saved = self.saved_step()
        if saved >= self.step:
            return f"step {saved} is saved, and only later steps are lost"
        return f"{self.step - saved} steps after step {saved} are lost; the same command resumes from step {saved}"


watcher: StopWatcher | None = None
"""Watcher of this process, if a tool has started it."""


def watch() -> None:
    """Start to react to requests to stop in this process. Tools call it first; library code does not."""
    global watcher
    watcher = StopWatcher()
    watcher.start()


def now_doing(what: str) -> None:
    """Set the activity that the message of a request to stop names: `waiting for the other ranks`."""
    if watcher is not None:
        watcher.doing = what


def _nothing(signum: int, frame: FrameType | None) -> None:
    """Do nothing. Python writes the number of a signal only if the signal has a handler."""


def _status(signum: signal.Signals) -> int:
    """Return INTERRUPTED for Ctrl-C. Other signals come from a batch system, which may start the run again."""
    return INTERRUPTED if signum == signal.SIGINT else REQUEUE


def _say(text: str) -> None:
    """Write a line on the first rank of each node. Another thread may hold the lock of Python's buffers, so they are not used."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{Path(sys.argv[0]).stem}: {text}\n".encode())


def _end(status: int, text: str) -> None:
    """End the process from this thread, without exit handlers, which would wait for the other ranks."""
    _say(text)
    # a reader of the output that has ended or hangs must not block the exit
    flushing = threading.Thread(target=sys.stdout.flush, daemon=True)
    flushing.start()
    flushing.join(1.0)
    os._exit(status)
