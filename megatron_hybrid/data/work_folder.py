"""Work folder PREFIX.partial: lock of the dataset PREFIX, and folder in which it is written.

The lock works on network file systems: a folder that already contains `owner.json` is renamed to PREFIX.partial, which
fails if another job's folder is there. The folder of a process that died on this host is taken over.

Files inside: owner.json; dataset.{bin,idx,json}; old.{bin,idx,json}, the replaced dataset, during a replacement;
complete, which marks the dataset as whole; takeover, held by the one job that may take the folder over.
"""

import json
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_hybrid.base.process import ProcessIdentity
from megatron_hybrid.data.errors import DataError

SUFFIXES = (".json", ".bin", ".idx")
"""File suffixes in the order of publication, so that an .idx is never next to the .bin of another dataset."""
_OWNER, _COMPLETE, _TAKEOVER = "owner.json", "complete", "takeover"
_OWN_NAMES = {_OWNER, _COMPLETE, _TAKEOVER, *(f"old{s}" for s in SUFFIXES)}
_OWN_NAMES |= {f"dataset{suffix}{end}" for suffix in SUFFIXES for end in ("", ".partial")}


class WorkFolder:
    """Lock of one prefix from entry to exit."""

    def __init__(self, prefix: str, finish: Callable[["WorkFolder"], None], say: Callable[[str], None]):
        """finish: complete the replacement that a dead process began; say: report a takeover."""
        self.prefix = prefix
        self.path = Path(f"{prefix}.partial")
        self.dataset = str(self.path / "dataset")
        self._finish, self._say = finish, say
        self._owner = _describe_this_process()

    def __enter__(self) -> "WorkFolder":
        candidate = Path(f"{self.path}-{self._owner['token']}")
        candidate.mkdir()
        try:
            (candidate / _OWNER).write_text(json.dumps(self._owner))
            with suppress(OSError):  # not empty: there is another owner
                candidate.rename(self.path)
        finally:
            (candidate / _OWNER).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                candidate.rmdir()
        if self._read_owner() != self._owner:
            self._take_over()
        return self

    def __exit__(self, *exception: object) -> None:
        if (self.path / _COMPLETE).exists():  # `move_back` failed: the next job completes the replacement
            return
        self._clear()
        (self.path / _OWNER).unlink(missing_ok=True)
        with suppress(OSError):  # NFS keeps files that other processes have open
            self.path.rmdir()

    def _read_owner(self) -> dict[str, Any] | None:
        """Return the owner; None if the folder names none, as after a kill.

        Raises:
            DataError: the file cannot be read, so its owner may live.
        """
        try:
            owner = json.loads((self.path / _OWNER).read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        except OSError as error:
            raise DataError(self._held(f"an unknown process ({error.filename}: {error.strerror})")) from error
        return owner if isinstance(owner, dict) and isinstance(owner.get("pid"), int) else None

    def _take_over(self) -> None:
        """Take over the folder of a dead process.

        Raises:
            DataError: its owner lives, or may live, or the folder is not one of this tool's.
        """
        owner = self._read_owner()
        self._refuse_unless_abandoned(owner)
        claim = self.path / _TAKEOVER
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise DataError(self._held("another job that takes it over")) from None
        try:
            if self._read_owner() != owner:  # another job was faster
                raise DataError(self._held(_name(self._read_owner())))
            if (self.path / _COMPLETE).exists():
                self._finish(self)
                self._say(f"{self.prefix}: completed the replacement that {_name(owner)} had begun")
            self._clear()
            self._write_owner()
            self._say(f"{self.path}: took over from {_name(owner)}, which is no longer running")
        finally:
            claim.unlink(missing_ok=True)

    def _refuse_unless_abandoned(self, owner: dict[str, Any] | None) -> None:
        if not os.path.lexists(self.path):
            raise DataError(f"{self.path}: another job has just released this work folder: run the command again")
        if not self.path.is_dir() or self.path.is_symlink():
            raise DataError(f"{self.path} exists and is not a work folder of this tool: give another output prefix")
        others = [n for n in os.listdir(self.path) if n not in _OWN_NAMES and not n.startswith(".nfs")]
        if others:
            raise DataError(
                f"{self.path} holds {others[0]}, which is not a file of this tool: give another output prefix"
            )
        if owner is not None and not _has_ended(owner):
            raise DataError(self._held(_name(owner)))

    def _held(self, holder: str) -> str:
        return (
            f"{self.prefix} is being written by {holder}. Give another output prefix, or wait. "
            f"If you are sure that this job is dead: rm -r {self.path}"
        )

    def _write_owner(self) -> None:
        new = self.path / f"dataset{SUFFIXES[0]}.partial"
        new.write_text(json.dumps(self._owner))
        new.replace(self.path / _OWNER)

    def _clear(self) -> None:
        """Remove this tool's files, except for the owner and the claim. Nothing else is removed."""
        for name in _OWN_NAMES - {_OWNER, _TAKEOVER}:
            (self.path / name).unlink(missing_ok=True)

    def _names(self, suffix: str) -> tuple[Path, Path, Path]:
        """Return the paths of the new, the replaced and the published file."""
        return self.path / f"dataset{suffix}", self.path / f"old{suffix}", Path(f"{self.prefix}{suffix}")

    def mark_complete(self) -> None:
        """Record that the new dataset is complete, before the first file of the old one is moved."""
        with (self.path / _COMPLETE).open("w") as file:
            os.fsync(file.fileno())

    def mark_published(self) -> None:
        """Record that the new dataset is in place and the old one can be removed."""
        (self.path / _COMPLETE).unlink()

    def move_in(self) -> None:
        """Replace the published dataset. After an interruption at any point, it can be called again."""
        for suffix in reversed(SUFFIXES):
            new, old, published = self._names(suffix)
            if new.exists() and published.exists():
                published.replace(old)
        for suffix in SUFFIXES:
            new, _, published = self._names(suffix)
            if new.exists():
                new.replace(published)

    def move_back(self) -> None:
        """Undo `move_in`, also after an interruption at any point."""
        if not (self.path / _COMPLETE).exists():
            return
        for suffix in reversed(SUFFIXES):
            new, _, published = self._names(suffix)
            if not new.exists():
                published.replace(new)
        for suffix in SUFFIXES:
            _, old, published = self._names(suffix)
            if old.exists():
                old.replace(published)
        (self.path / _COMPLETE).unlink()


def _describe_this_process() -> dict[str, Any]:
    process = asdict(ProcessIdentity.current())
    return process | {"token": secrets.token_hex(8), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}


def _name(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "an unknown process"
    return f"process {owner['pid']} on host {owner.get('host')} (since {owner.get('since')})"


def _has_ended(owner: dict[str, Any]) -> bool:
    """Return True only if the owner is certain to have ended: a process of this host."""
    try:
        return (
            ProcessIdentity(**{field.name: owner[field.name] for field in fields(ProcessIdentity)}).has_ended() is True
        )
    except KeyError:
        return False
