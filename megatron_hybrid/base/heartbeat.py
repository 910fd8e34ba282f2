"""Heartbeat of this process: its activity, its steps, and how often it has made progress. No torch here.

The main thread writes it. Two threads read it: the one that handles requests to stop (launch/stop_signals.py) and the one that
detects hangs (train/watchdog/).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Heartbeat:
    """Progress of the main thread.

    Attributes:
        activity: current activity, for messages: `running step 12`.
        section: `setup`, `step`, `checkpointing`, or None between them: names of limits that other monitors have.
        beats: number of signs of progress so far.
        step: last finished step.
        has_trained: True once a step has ended in this process. Before that, kernels are compiled and there is nothing to save.
        step_began: time at which the current step began (time.monotonic), or None between steps.
        longest_step: seconds of the longest step. The first step, which compiles kernels, counts only until the second has ended.
        progress: returns a value that changes while others work for this process, such as the size of files that they write.
    """

    def __init__(self) -> None:
        self.activity = "starting"
        self.section: str | None = "setup"
        self.beats = 0
        self.step = 0
        self.step_began: float | None = None
        self.longest_step = 0.0
        self.progress: Callable[[], object] | None = None
        self._steps_ended = 0

    @property
    def has_trained(self) -> bool:
        return self._steps_ended > 0

    def beat(self, activity: str | None = None) -> None:
        """Record progress and, if given, the new activity."""
        self.beats += 1
        if activity is not None:
            self.activity = activity

    def begin_step(self, step: int) -> None:
        """Record that a step begins after `step` steps."""
        self.step, self.step_began, self.section = step, time.monotonic(), "step"
        self.beat(f"running step {step + 1}")

    def end_step(self, step: int) -> None:
        """Record that step `step` has ended on all ranks. From now on there is something to save."""
        assert self.step_began is not None
        seconds = time.monotonic() - self.step_began
        self.longest_step = max(self.longest_step, seconds) if self._steps_ended > 1 else seconds
        self.step, self.step_began, self.section = step, None, None
        self._steps_ended += 1
        self.beat()

    @contextmanager
    def doing(
        self, activity: str, progress: Callable[[], object] | None = None, section: str | None = None
    ) -> Iterator[None]:
        """Set the activity, the section, and the source of progress by other processes, inside the context."""
        before = self.activity, self.progress, self.section
        self.progress, self.section = progress, section
        self.beat(activity)
        try:
            yield
        finally:
            self.activity, self.progress, self.section = before
            self.beat()


heartbeat = Heartbeat()
"""Heartbeat of this process."""
