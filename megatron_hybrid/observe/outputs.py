"""Outputs of a log whose failures do not end the run: each is reported once, and writing is tried again."""

import time
from collections.abc import Callable, Mapping

from megatron_hybrid.observe.sinks import Sink

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 600.0


class Output:
    """Attempts to write one output.

    Args:
        name: name for reports: `metrics.jsonl`.
        report: prints a line.
        waits: True to wait longer after each failure. False to try every time.
    """

    def __init__(self, name: str, report: Callable[[str], None], waits: bool = False) -> None:
        self.name, self.report, self.waits = name, report, waits
        self.failures = 0
        """Failures since the last success."""
        self._reported = False
        self._next = 0.0

    def attempt(self, write: Callable[[], object]) -> bool:
        """Call `write` unless it is too early after a failure. Return True if it succeeded."""
        if time.monotonic() < self._next:
            return False
        try:
            write()
        except Exception as error:  # noqa: BLE001 - whatever a library raises must not end the run; it is reported
            self._fail(error)
            return False
        if self.failures:
            self.report(f"{self.name} is written again, after {self.failures} failures")
            self.failures, self._reported = 0, False
        return True

    def _fail(self, error: Exception) -> None:
        self.failures += 1
        if self.waits:
            pause = min(_FIRST_PAUSE_S * 2.0 ** (self.failures - 1), _LONGEST_PAUSE_S)
            self._next = time.monotonic() + pause
        if not self._reported:
            self._reported = True
            self.report(f"{self.name} cannot be written: {_reason(error)}; the run continues and tries again")


class RetriedSink:
    """Sink that is created again after a failure, because writers of libraries stay broken after one.

    Args:
        make: creates the sink. It receives the first step that the sink will log, and whether the sink is created again.
    """

    def __init__(
        self, name: str, make: Callable[[int, bool], Sink], start_step: int, report: Callable[[str], None]
    ) -> None:
        self._make, self._output = make, Output(name, report, waits=True)
        self._sink: Sink | None = None
        self._created = False
        self._output.attempt(lambda: self._open(start_step + 1))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the numbers of a step, or lose them if the sink fails."""

        def write() -> None:
            sink = self._sink or self._open(step)
            sink.log(step, scalars)

        failures = self._output.failures
        if not self._output.attempt(write) and self._output.failures > failures:
            self._drop()

    def close(self) -> None:
        """Close the sink."""
        if self._sink is not None:
            self._output.attempt(self._sink.close)

    def _open(self, step: int) -> Sink:
        self._sink = self._make(step, self._created)
        self._created = True
        return self._sink

    def _drop(self) -> None:
        """Close a broken sink, whose own failure adds nothing to the one that was reported."""
        broken, self._sink = self._sink, None
        if broken is not None:
            Output("", lambda text: None).attempt(broken.close)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
