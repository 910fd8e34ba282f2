"""Standard output and error that nobody reads any more, or whose disk is full.

- `tolerate_output_errors`: a run continues without them.
- `quiet_on_closed_pipe`: a tool ends, as other Unix tools do.
"""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class TolerantStream:
    """Text stream whose failures are reported once, on another stream. Every write is tried again."""

    def __init__(self, stream: TextIO, name: str, reports_to: "TextIO | TolerantStream | None" = None) -> None:
        self._stream, self._name, self._reports_to, self._failed = stream, name, reports_to, False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def _fail(self, error: Exception) -> None:
        if self._failed:
            return
        self._failed = True
        if self._reports_to is not None:
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"{self._name} cannot be written: {reason}; the run continues", file=self._reports_to, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerate_output_errors() -> None:
    """Make failures of standard output and error harmless in this process. A second call has no effect."""
    if isinstance(sys.stdout, TolerantStream):
        return
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # its descriptor was closed when the process started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    stderr = TolerantStream(sys.stderr, "stderr")
    sys.stdout, sys.stderr = TolerantStream(sys.stdout, "stdout", stderr), stderr


CLOSED_PIPE = 141
"""Exit status of a tool whose output nobody reads any more, as shells report SIGPIPE."""


@contextmanager
def quiet_on_closed_pipe() -> Iterator[None]:
    """End the process without a traceback when a pipe that it prints to is closed, as with `| head`."""
    try:
        try:
            yield
        except SystemExit:
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        if not (closed := _closed_streams()):
            raise  # another pipe, such as that of a worker
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:
            os.dup2(null, stream.fileno())  # what is still buffered is written when the process ends
        sys.exit(CLOSED_PIPE)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _closed_streams() -> list[TextIO]:
    """Return which of standard output and error are pipes that nobody can read from."""
    closed = []
    for stream in (sys.stdout, sys.stderr):
        try:
            poll = select.poll()
            poll.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                closed.append(stream)
        except (AttributeError, OSError, ValueError):  # closed, or not a file
            continue
    return closed
