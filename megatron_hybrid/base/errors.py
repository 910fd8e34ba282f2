"""Errors that a user reads: one line for each wrong field, with its remedy."""

import os
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from megatron_hybrid.base.storage import FAILURES, describe_failure

BAD_INPUT = 78
"""Exit status after wrong input (EX_CONFIG of sysexits.h)."""
REQUEUE = 75
"""Exit status of a run that stopped before its last step and resumes when started again (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""Exit status after Ctrl-C of tools that save nothing, as shells report SIGINT."""


class UserError(ValueError):
    """Wrong input. The message names the field or file, the reason and the remedy; tools print it without a traceback."""

    printed_by: Literal["first rank", "each node", "each rank"] = "first rank"
    """Ranks that print the error. `first rank` is for errors that all ranks raise."""
    status: int = BAD_INPUT
    """Exit status of tools after this error."""


class ConfigError(UserError):
    """Wrong configuration: `(field, message)` pairs, printed one per line.

    Validators raise it with fields relative to their own section. `translate` (config/translate.py) adds the section's path.
    """

    def __init__(self, *problems: tuple[str, str]) -> None:
        super().__init__(*problems)
        self.problems = problems

    @classmethod
    def at(cls, field: str, message: str) -> "ConfigError":
        """Return the error of a single field."""
        return cls((field, message))

    def __str__(self) -> str:
        return "\n".join(f"{field}: {message}" if field else message for field, message in self.problems)


class LaunchError(UserError):
    """Incomplete or contradictory launcher environment. The message names the variables and the remedy."""

    printed_by: Literal["first rank", "each node", "each rank"] = "each rank"


class StorageError(UserError):
    """A file system is full, read-only or failing. The message names the path, the reason and the remedy."""


def as_storage_error(
    error: OSError, path: str | os.PathLike[str] = "a file", needed: int | None = None
) -> StorageError | None:
    """Return the error of a failing file system for users; None: another kind of error. See `describe_failure`."""
    return StorageError(describe_failure(error, path, needed)) if error.errno in FAILURES else None


@contextmanager
def storage_errors(path: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Raise a StorageError for an OSError of a failing file system. See `describe_failure` for the arguments."""
    try:
        yield
    except OSError as error:
        if (failure := as_storage_error(error, path, needed)) is None:
            raise
        raise failure from error


@contextmanager
def no_traceback() -> Iterator[None]:
    """End the process without a traceback.

    The status is that of a UserError, BAD_INPUT after an OSError of a failing file system, INTERRUPTED after Ctrl-C.
    """
    try:
        yield
    except UserError as error:
        variable = {"first rank": "RANK", "each node": "LOCAL_RANK", "each rank": ""}[error.printed_by]
        if os.environ.get(variable, "0") == "0":
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except OSError as error:  # one rank alone may raise it: every rank prints its own
        if (failure := as_storage_error(error)) is None:
            raise
        print(f"{Path(sys.argv[0]).stem}: {failure}", file=sys.stderr)
        sys.exit(failure.status)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).stem}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


class Problems(list[tuple[str, str]]):
    """Collected `(field, message)` pairs, reported in one error."""

    def add(self, field: str, message: str) -> None:
        self.append((field, message))

    def raise_if_any(self) -> None:
        """Raise a ConfigError with all problems, if there are any."""
        if self:
            raise ConfigError(*dict.fromkeys(self))


def shown(value: object) -> str:
    """Return a value as written in YAML, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value)


def join(*parts: int | str) -> str:
    """Join the parts of a path: `("data", "train", 0, "path")` gives `data.train.0.path`."""
    return ".".join(str(part) for part in parts if part != "")
