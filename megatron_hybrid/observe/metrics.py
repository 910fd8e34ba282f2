"""metrics.jsonl: one JSON object a step, in ascending steps, each step once, through crashes and resumes.

A line is written with one system call and never waits in a buffer of ours, so a killed process loses at most the line
it was writing. A value that is not finite is written as null: NaN is not JSON.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self


def plain(value: Any) -> Any:
    """A JSON value: numbers from torch and numpy unwrapped, and None for those that are not finite."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path: Path | str) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, also of one that is being written: an unfinished last line is left out.

    Raises:
        ValueError: a line other than the last is not a JSON object with a step.
    """
    for _, record in _lines(Path(path)):
        yield record


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Offset and record of each line; ends before a torn last one."""
    offset, torn = 0, None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise ValueError(f"{path}, line {torn} is not a JSON object with a step: the file is damaged")
            try:
                record = json.loads(line)
                record["step"] + 0  # a number
            except (ValueError, TypeError, KeyError):
                torn = number
                continue
            yield offset, record
            offset += len(line)


class MetricsWriter:
    """Appends to a metrics.jsonl.

    Args:
        path: the file; made if missing.
        start_step: the last step that is kept, that of the checkpoint a run resumes from. Later lines, which the
            resumed run will write again, are dropped. At 0 a new run begins: an earlier file is kept as `<path>.old`.
    """

    def __init__(self, path: Path | str, start_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if start_step == 0 and self.path.exists() and self.path.stat().st_size:
            self.path.replace(self.path.with_name(self.path.name + ".old"))
        self.path.touch()
        self._offset = self._end = 0  # of the last line
        self._last: dict[str, Any] = {}
        for offset, record in _lines(self.path):
            if record["step"] > start_step:
                break
            self._offset, self._last = offset, record
        self._fd = os.open(self.path, os.O_RDWR)
        self._put(self._last)  # drops later steps and a torn line alike

    @property
    def last_step(self) -> int | None:
        """The step of the last line; None: there is none."""
        return self._last.get("step")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, or add its values to the last line where that is of the same step.

        Raises:
            ValueError: the record's step lies before the last line's.
        """
        record = {key: plain(value) for key, value in record.items()}
        step = record["step"]
        if self._last and step < self._last["step"]:
            raise ValueError(f"step {step} cannot be logged after step {self._last['step']}")
        if self._last and step == self._last["step"]:
            record = self._last | record
        else:
            self._offset = self._end
        self._last = record
        self._put(record)

    def _put(self, record: Mapping[str, Any]) -> None:
        """Make a record the last line: what stands at the last line's offset or after it goes."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode() if record else b""
        if os.pwrite(self._fd, line, self._offset) != len(line):
            raise OSError(f"{self.path}: a line could not be written whole; is the disk full?")
        self._end = self._offset + len(line)
        os.ftruncate(self._fd, self._end)

    def close(self) -> None:
        """Close the file. Writing is over."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
