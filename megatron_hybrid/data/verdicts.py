"""Stored verdicts of the token check on files that have not changed, in the run's folder.

Every process writes a file of its own, so that no two writers can lose each other's verdicts on a shared file system:
rank 0 writes `validated_data.json`, rank n `validated_data.n.json`. Every process reads all of them. Files that cannot be
read are ignored: what they held is checked again.

An entry is `{path: {"is": [bytes, mtime_ns, type], "max_token": int}}` for a file that was read completely, with
`"sampled": true` for one of which parts were read, or with `"pieces": {key: largest token}` while the check is under way.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_hybrid.data.errors import DataError

SAVE_EVERY_S = 5.0
"""Seconds between writes of verdicts. Later verdicts are lost if the process is killed."""
_NAME = "validated_data"


class VerdictCache:
    """Verdicts by path, type and state of a file."""

    def __init__(self, folder: str | Path | None, writer: int = 0):
        """Open the verdicts in a folder. None: store nothing. writer: rank of this process."""
        self._folder = None if folder is None else Path(folder)
        self._writer = writer
        self._own = _load(self._file)
        self._others: list[dict[str, Any]] = [_load(file) for file in self._other_files()]
        self._saved, self._changed = time.monotonic(), False

    @property
    def _file(self) -> Path | None:
        name = f"{_NAME}.json" if self._writer == 0 else f"{_NAME}.{self._writer}.json"
        return None if self._folder is None else self._folder / name

    def _other_files(self) -> list[Path]:
        if self._folder is None:
            return []
        return [file for file in sorted(self._folder.glob(f"{_NAME}*.json")) if file != self._file]

    def get(self, path: str, read_as: str, sampled: bool = False) -> int | None:
        """Return the largest token found in a file that was read as this type; None: unknown, or the file has changed.

        Args:
            sampled: a verdict on parts of the file is enough.
        """
        for entry in self._entries(path, read_as):
            top = entry.get("max_token")
            if type(top) is int and (sampled or not entry.get("sampled")):
                return top
        return None

    def get_piece(self, path: str, read_as: str, key: str) -> int | None:
        """Return the largest token found in a piece of a file."""
        for entry in self._entries(path, read_as):
            pieces = entry.get("pieces")
            if isinstance(pieces, dict) and type(pieces.get(key)) is int:
                return int(pieces[key])
        return None

    def _entries(self, path: str, read_as: str) -> list[dict[str, Any]]:
        name, identity = os.path.abspath(path), _identity(path, read_as)
        found = [verdicts.get(name) for verdicts in (self._own, *self._others)]
        return [entry for entry in found if isinstance(entry, dict) and entry.get("is") == identity]

    def put(self, path: str, read_as: str, max_token: int, sampled: bool = False) -> None:
        """Store the largest token of a file."""
        entry: dict[str, Any] = {"is": _identity(path, read_as), "max_token": max_token}
        self._own[os.path.abspath(path)] = entry | ({"sampled": True} if sampled else {})
        self._changed = True

    def put_piece(self, path: str, read_as: str, key: str, max_token: int) -> None:
        """Store the largest token of a piece of a file, with those of its other pieces."""
        name, identity = os.path.abspath(path), _identity(path, read_as)
        entry = self._own.get(name)
        if not isinstance(entry, dict) or entry.get("is") != identity:
            entry = self._own[name] = {"is": identity}
        if not isinstance(entry.get("pieces"), dict):
            entry["pieces"] = {}
        entry["pieces"][key] = max_token
        self._changed = True

    def save(self, at_once: bool = True) -> None:
        """Write what was added, unless it was written less than SAVE_EVERY_S ago and at_once is false.

        Raises:
            DataError: the folder cannot be written.
        """
        file = self._file
        if file is None or not self._changed or not (at_once or time.monotonic() - self._saved > SAVE_EVERY_S):
            return
        self._own = _load(file) | self._own  # another process may have had the same number before
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._own), encoding="utf-8")
            os.replace(partial, file)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be written: {error.strerror}; the run needs a folder it can write"
            ) from error
        self._saved, self._changed = time.monotonic(), False

    def collect(self) -> None:
        """Move the other processes' verdicts into this one's file. Call it on one process when the others are done.

        Verdicts on files that look different from here are left: another node has other files of the same names.
        """
        for file in self._other_files():
            theirs = _load(file)
            mine = {path: entry for path, entry in theirs.items() if _is_current(path, entry)}
            for path, entry in mine.items():
                self._own[path] = _merge(self._own.get(path), entry)
                self._changed = True
            self.save()
            if mine.keys() == theirs.keys():
                with suppress(OSError):
                    file.unlink()


def _load(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        verdicts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return verdicts if isinstance(verdicts, dict) else {}


def _merge(one: Any, other: dict[str, Any]) -> dict[str, Any]:
    """Return the more complete of two verdicts on the same file."""
    if not isinstance(one, dict) or one.get("is") != other["is"]:
        return other
    for entry in (one, other):
        if "max_token" in entry and not entry.get("sampled"):
            return entry
    pieces = {**(one.get("pieces") or {}), **(other.get("pieces") or {})}
    return one | other | ({"pieces": pieces} if pieces else {})


def _is_current(path: str, entry: Any) -> bool:
    """Return True if a verdict is about the current state of the file."""
    try:
        return isinstance(entry, dict) and entry["is"] == _identity(path, entry["is"][2])
    except (DataError, KeyError, IndexError, TypeError):
        return False


def _identity(path: str, read_as: str) -> list[int | str]:
    """Return the state of a file, which changes when the file changes."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return [stat.st_size, stat.st_mtime_ns, read_as]
