"""Console output of rank 0: a progress bar on a terminal, otherwise plain lines of at most 80 columns."""

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Protocol, TextIO, cast

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn

from megatron_hybrid.base.output import TolerantStream

_COLUMNS = 80
_SHORTEST_BAR = 8


class Console(Protocol):
    """Display of a run's progress."""

    def step(self, step: int, record: Mapping[str, Any]) -> None:
        """Show a finished step."""

    def info(self, message: str) -> None:
        """Print a line."""

    def close(self) -> None: ...


def make_console(total_steps: int, start_step: int = 0, stream: TextIO | None = None, every: int = 10) -> Console:
    """Return a progress bar if `stream` (stdout) is a terminal, otherwise a console with a line every `every` steps."""
    # mypy: TolerantStream has the methods of a text stream that are used here
    stream = cast(TextIO, TolerantStream(stream or sys.stdout, "the console", sys.stderr))
    if stream.isatty():
        return ProgressConsole(total_steps, start_step, stream)
    return PlainConsole(total_steps, start_step, stream, every)


class Eta:
    """Remaining time by the mean pace of the last steps, evaluation and checkpoints included."""

    def __init__(self, total_steps: int, now: Callable[[], float] = time.monotonic) -> None:
        self._total, self._now = total_steps, now
        self._seen: deque[tuple[int, float]] = deque(maxlen=101)

    def __call__(self, step: int) -> str:
        """Return the remaining time after `step` as `0:12:34`, or `-:--:--` before the second step."""
        self._seen.append((step, self._now()))
        (first, start), (last, end) = self._seen[0], self._seen[-1]
        if last <= first:
            return "-:--:--"
        seconds = (end - start) / (last - first) * max(self._total - step, 0)
        return str(timedelta(seconds=round(seconds)))


_PARTS = {
    "loss": "loss {:.4f}",
    "grad_norm": "norm {:.3g}",
    "tokens_per_s": "{:,.0f} tok/s",
    "mfu": "MFU {:.0%}",
    "lr": "lr {:.1e}",
    "memory_gb": "{:.3g} GB",
    "tflops": "{:.3g} TFLOP/s",
    "power_w": "{:.0f} W",
}
"""Values of a step, the most important first."""


def describe(record: Mapping[str, Any], width: int = 80) -> str:
    """Return the main values of a step as one line of at most `width` columns. Missing values are left out."""
    line = ""
    for key, text in _PARTS.items():
        if record.get(key) is None:
            continue
        longer = f"{line}  {text.format(record[key])}".lstrip()
        if len(longer) > width:
            break
        line = longer
    return line


class PlainConsole:
    """Console with a line for the first and last step, every `every` steps, after `patience` seconds without output, and for
    every skipped update.
    """

    def __init__(
        self, total_steps: int, start_step: int, stream: TextIO, every: int = 10, patience: float = 30.0
    ) -> None:
        self._total, self._first, self._stream = total_steps, start_step + 1, stream
        self._every, self._patience = every, patience
        self._eta = Eta(total_steps)
        self._last_line = time.monotonic()

    def step(self, step: int, record: Mapping[str, Any]) -> None:
        eta = self._eta(step)
        due = step in (self._first, self._total) or step % self._every == 0
        if due or record.get("skipped") or time.monotonic() - self._last_line > self._patience:
            self._last_line = time.monotonic()
            begin, end = f"step {step}/{self._total}  ", f"  ETA {eta}"
            self.info(f"{begin}{describe(record, _COLUMNS - len(begin) - len(end))}{end}{_skipped(record)}")

    def info(self, message: str) -> None:
        print(message, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class ProgressConsole:
    """Progress bar with messages above it."""

    def __init__(self, total_steps: int, start_step: int, stream: TextIO) -> None:
        self._eta, self._total = Eta(total_steps), total_steps
        self._console = RichConsole(file=stream, highlight=False)
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[values]}"),
            TextColumn("ETA {task.fields[eta]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step, values="", eta="-:--:--")
        self._progress.start()

    def step(self, step: int, record: Mapping[str, Any]) -> None:
        eta = self._eta(step)
        taken = len(f"step {step}/{self._total}   ETA {eta}") + _SHORTEST_BAR + 2
        values = describe(record, self._console.width - taken)
        self._progress.update(self._task, completed=step, values=values, eta=eta)
        if record.get("skipped"):
            self.info(f"step {step}{_skipped(record)}")

    def info(self, message: str) -> None:
        self._console.print(message, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _skipped(record: Mapping[str, Any]) -> str:
    return f"  SKIPPED: {record.get('skip_reason', '')}" if record.get("skipped") else ""
