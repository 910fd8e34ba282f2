"""Standard output and error that do not end a run: nobody reads them any more, or their disk is full."""

import os
import sys
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
