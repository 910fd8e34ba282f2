"""metrics.jsonl: one JSON object per step, in ascending order, each step once, also after crashes and resumes.

Each line is written with one system call and without a buffer, so a killed process loses at most the current line. Values that are not
finite are written as null, because NaN is not JSON. When a run resumes, damaged lines are moved to `metrics.jsonl.damaged`.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

_MOST_UNWRITTEN = 100_000
"""Lines to keep in memory while they cannot be written."""


def plain(value: Any) -> Any:
    """Convert a number of torch or numpy to a JSON value. Values that are not finite become None."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path: Path | str) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl. An unfinished last line is left out, so the file may still be written.

    Raises:
        ValueError: a line other than the last is not a JSON object with a step.
    """
    torn = None
    for number, _, record in _lines(Path(path)):
        if torn is not None:
            raise ValueError(f"{path}, line {torn} is not a JSON object with a step: the file is damaged")
        if record is None:
            torn = number
        else:
            yield record


def _lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Yield number, bytes and record of each line. The record is None if the line is not a JSON object with a step."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                whole = isinstance(record, dict) and type(record.get("step")) in (int, float)
            except (ValueError, RecursionError):
                whole = False
            yield number, line, record if whole else None


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def unused_name(path: Path) -> Path:
    """Return `path`, or the first of `path-2`, `path-3`, ... that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def repair(path: Path) -> str:
    """Move damaged lines, and lines whose step is not above the previous one, to another file.

    Returns:
        A line that reports the moved lines.
    """
    kept: list[bytes] = []
    damaged: list[bytes] = []
    step: float = -1
    for _, line, record in _lines(path):
        if record is None or record["step"] <= step:
            damaged.append(line)
        else:
            kept.append(line)
            step = record["step"]
    aside = unused_name(path.with_name(path.name + ".damaged"))
    aside.write_bytes(b"".join(damaged))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)
    return f"{path} was damaged: moved {len(damaged)} lines to {aside.name}"


class MetricsWriter:
    """Writer that appends to a metrics.jsonl.

    Args:
        path: the file, which is created if it is missing.
        start_step: step of the checkpoint that the run resumes from. Later lines are dropped, because the run will write them again.
            0: a new run; an earlier file is kept as `<path>.old`.

    Attributes:
        repaired: report of damaged lines that were moved to another file, or None.
    """

    def __init__(self, path: Path | str, start_step: int = 0) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and (self.path.is_dir() or (start_step == 0 and self.path.stat().st_size)):
            self.path.replace(unused_name(self.path.with_name(self.path.name + ".old")))
        self.path.touch()
        self.repaired = None if self._find_end(start_step) else repair(self.path)
        if self.repaired:
            self._find_end(start_step)
        self._fd = os.open(self.path, os.O_RDWR)
        self._lines = [_line(self._last)] if self._last else []
        self._written = False
        self._put()  # drops later steps

    def _find_end(self, start_step: int) -> bool:
        """Find the last line to keep. Return False if a line up to there is damaged or out of order."""
        self._offset = self._end = 0  # of the last line
        self._last: dict[str, Any] = {}
        offset, torn = 0, False
        for _, line, record in _lines(self.path):
            if torn or (record is not None and self._last and record["step"] <= self._last["step"]):
                return False
            if record is None:
                torn = True
                continue
            if record["step"] > start_step:
                break
            self._offset, self._last = offset, record
            offset += len(line)
        return not torn

    @property
    def last_step(self) -> int | None:
        """Step of the last line, or None."""
        return self._last.get("step")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record, or add its values to the last line where that is of the same step.

        Raises:
            ValueError: the record's step is before the last line's.
            OSError: the line could not be written. The next call writes it too.
        """
        record = {key: plain(value) for key, value in record.items()}
        step = record["step"]
        if self._last and step < self._last["step"]:
            raise ValueError(f"step {step} cannot be logged after step {self._last['step']}")
        if self._last and step == self._last["step"]:
            record = self._last | record
            self._lines[-1:] = [_line(record)]
        else:
            if self._written:
                self._offset, self._lines = self._end, []
            self._lines = [*self._lines[1 - _MOST_UNWRITTEN :], _line(record)]
        self._last = record
        self._put()

    def _put(self) -> None:
        """Write the lines that are not written yet and the last line, and cut off what follows."""
        self._written = False
        self._reopen()
        data = b"".join(self._lines)
        if os.pwrite(self._fd, data, self._offset) != len(data):
            raise OSError(errno.ENOSPC, "a line could not be written completely")
        self._end = self._offset + len(data)
        os.ftruncate(self._fd, self._end)
        self._lines = self._lines[-1:]
        self._offset = self._end - sum(map(len, self._lines))
        self._written = True

    def _reopen(self) -> None:
        """Create the file again if it was removed: by the next call, so that the removal is reported.

        Raises:
            OSError: the file was removed.
        """
        if self._fd < 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd, self._offset = os.open(self.path, os.O_RDWR | os.O_CREAT), 0
        elif os.fstat(self._fd).st_nlink == 0:
            self.close()
            raise OSError(errno.ENOENT, "it was removed, with the earlier steps")

    def close(self) -> None:
        """Close the file. Writing is over."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
