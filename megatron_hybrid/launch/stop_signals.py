"""Requests to stop: react to SIGTERM, SIGUSR1 and Ctrl-C within seconds. No torch here.

Python runs signal handlers in the main thread between two bytecodes, so not while that thread waits in C++ for other ranks. But
the interpreter immediately writes the number of each signal to a file descriptor (`signal.set_wakeup_fd`), and a thread that
reads it can end the process.

Before the first step is finished there is nothing to save, and the process ends. Later, the training loop saves after the current step
(train/interrupt.py), and further signals change nothing. The process also ends if the current step does not end because a rank hangs.

A rank that torchrun has started treats the end of torchrun as a request to stop: torchrun ends at a SIGUSR1 without telling its ranks.
"""

import atexit
import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from megatron_hybrid.base.errors import REQUEUE
from megatron_hybrid.base.heartbeat import heartbeat

PATIENCE_S = 60.0
"""Seconds that a step may take after a request, or PATIENCE_STEPS times the longest step, if that is longer."""
PATIENCE_STEPS = 10
_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_TICK_S = 0.5
_LAUNCHER_TICK_S = 1.0
_ASK_S = 2.0
"""Seconds to wait for the step of the last checkpoint."""
STARTED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""Variable that torchrun, and launchers that derive from it, set for their ranks."""


def asks_to_stop() -> list[signal.Signals]:
    """Return the signals that ask a run to stop.

    SIGUSR1 is SLURM's warning before the time limit. SIGTERM comes on preemption and shutdown. SIGINT is Ctrl-C; it is left out
    if this process ignores it, as background jobs of shell scripts do.
    """
    interactive = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    return [signal.SIGUSR1, signal.SIGTERM, *([signal.SIGINT] if interactive else [])]


class StopWatcher(threading.Thread):
    """Thread that receives requests to stop, and ends the process if the main thread cannot or need not react.

    It reads the progress of the run from the heartbeat of the process.

    Attributes:
        saved_step: returns the step from which a restart would resume.
    """

    def __init__(self) -> None:
        super().__init__(name="stop signals", daemon=True)
        self.saved_step: Callable[[], int] = lambda: 0
        self._launcher = os.getppid() if STARTED_BY_TORCHRUN in os.environ else None
        self._asked: tuple[signal.Signals, float] | None = None
        self._numbers, end = os.pipe()
        os.set_blocking(end, False)
        for signum in asks_to_stop():
            signal.signal(signum, _nothing)
        signal.set_wakeup_fd(end, warn_on_full_buffer=False)
        unblock_stop_signals()
        # megatron-hybrid launch asks for the stacks of ranks that do not end. This handler needs no lock of Python.
        with contextlib.suppress(ValueError, AttributeError, OSError):  # stderr has no descriptor
            faulthandler.register(signal.SIGQUIT, all_threads=True)

    def run(self) -> None:
        """Wait for signals, and after a signal for the end of the current step."""
        while True:
            ready, _, _ = select.select([self._numbers], [], [], self._tick())
            for number in os.read(self._numbers, 64) if ready else b"":
                if number in _STOP_SIGNALS:
                    self._react(signal.Signals(number))
            self._end_hanging_step()
            self._watch_launcher()

    def _tick(self) -> float | None:
        if self._asked is not None:
            return _TICK_S
        return None if self._launcher is None else _LAUNCHER_TICK_S

    def _watch_launcher(self) -> None:
        """Ask this process to stop if torchrun has ended: nothing else would end its ranks."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self._launcher = None
            _say("torchrun has ended without its ranks: stopping", every_rank=True)
            os.kill(os.getpid(), signal.SIGTERM)

    def _react(self, signum: signal.Signals) -> None:
        if not heartbeat.has_trained:
            again = "there was nothing to save, and nothing is lost; run the same command again"
            _end(REQUEUE, f"asked to stop by {signum.name} while {heartbeat.activity}: {again}")
        elif self._asked is None:
            self._asked = signum, time.monotonic()
            if signum == signal.SIGINT:
                _say("asked to stop by Ctrl-C: saving after this step; to end without saving, use kill -9")

    def _end_hanging_step(self) -> None:
        began = heartbeat.step_began
        if self._asked is None or began is None:
            return
        signum, asked = self._asked
        waited = time.monotonic() - max(began, asked)
        if waited > max(PATIENCE_S, PATIENCE_STEPS * heartbeat.longest_step):
            words = f"asked to stop by {signum.name}, and step {heartbeat.step + 1} has not ended within {waited:.0f} s"
            _end(REQUEUE, f"{words}: another rank hangs or has ended. Ended without saving: {self._lost()}")

    def _lost(self) -> str:
        """Return the steps that are lost. The file system that tells it may be what hangs, so it is asked in a thread."""
        found: list[int] = []

        def ask() -> None:
            with contextlib.suppress(OSError):
                found.append(self.saved_step())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ASK_S)
        step = heartbeat.step
        if not found:
            return "steps after the last checkpoint are lost; the same command resumes from it"
        saved = found[0]
        if saved >= step:
            return f"step {saved} is saved, and only later steps are lost"
        return f"{step - saved} steps after step {saved} are lost; the same command resumes from step {saved}"


watcher: StopWatcher | None = None
"""Watcher of this process, if a tool has started it."""


def watch() -> None:
    """Start to react to requests to stop in this process. Tools call it first; library code does not."""
    global watcher
    watcher = StopWatcher()
    watcher.start()


def unblock_stop_signals() -> None:
    """Receive the signals that the command and megatron-hybrid launch block until there is a handler for them.

    They are ignored while the process exits. Python would restore their default action, and a second signal would replace the status.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    atexit.register(_ignore_stop_signals)


def _ignore_stop_signals() -> None:
    for signum in _STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def _nothing(signum: int, frame: FrameType | None) -> None:
    """Do nothing. Python writes the number of a signal only if the signal has a handler."""


def _say(text: str, every_rank: bool = False) -> None:
    """Write a line on the first rank of each node. Another thread may hold the lock of Python's buffers, so they are not used."""
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
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
