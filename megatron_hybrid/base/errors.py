"""Errors that a user reads: one line for each wrong field, with its remedy."""

import os
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

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


@contextmanager
def no_traceback() -> Iterator[None]:
    """End the process without a traceback: after a UserError with its status, after Ctrl-C with status INTERRUPTED."""
    try:
        yield
    except UserError as error:
        variable = {"first rank": "RANK", "each node": "LOCAL_RANK", "each rank": ""}[error.printed_by]
        if os.environ.get(variable, "0") == "0":
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(error.status)
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
