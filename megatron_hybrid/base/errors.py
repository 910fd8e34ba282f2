"""Errors a user reads: each wrong field with its remedy, one line each."""

import os
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

BAD_INPUT = 78
"""Exit status of a tool that was given something wrong: EX_CONFIG of sysexits.h."""
REQUEUE = 75
"""Exit status of a run that stopped before its last step, and that resumes when it is run again: EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130
"""Exit status after a Ctrl-C that saved nothing, as shells report SIGINT."""


class UserError(ValueError):
    """Something a user gave is wrong; the message says what, where, and what to do. Tools print it without a traceback."""

    printed_by: Literal["first rank", "each node", "each rank"] = "first rank"
    """Which ranks of a run print it: the first where all ranks meet the same error, others where they may not."""


class ConfigError(UserError):
    """What is wrong with a configuration: `(field, message)` pairs, a line each when printed.

    Validators raise it with fields relative to their own section; `translate` (config/translate.py) puts the
    section's name before them.
    """

    def __init__(self, *problems: tuple[str, str]) -> None:
        super().__init__(*problems)
        self.problems = problems

    @classmethod
    def at(cls, field: str, message: str) -> "ConfigError":
        """Of a single field."""
        return cls((field, message))

    def __str__(self) -> str:
        return "\n".join(f"{field}: {message}" if field else message for field, message in self.problems)


class LaunchError(UserError):
    """The environment that the launcher set is incomplete or contradicts itself; names the variables and the remedy."""

    printed_by: Literal["first rank", "each node", "each rank"] = "each rank"


@contextmanager
def no_traceback() -> Iterator[None]:
    """End the process with the message alone after a UserError, status BAD_INPUT, and after Ctrl-C, status INTERRUPTED."""
    try:
        yield
    except UserError as error:
        variable = {"first rank": "RANK", "each node": "LOCAL_RANK", "each rank": ""}[error.printed_by]
        if os.environ.get(variable, "0") == "0":
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).stem}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


class Problems(list[tuple[str, str]]):
    """`(field, message)` pairs, collected so that one error tells all of them."""

    def add(self, field: str, message: str) -> None:
        self.append((field, message))

    def raise_if_any(self) -> None:
        """Raise ConfigError with all of them, if there are any."""
        if self:
            raise ConfigError(*dict.fromkeys(self))


def shown(value: object) -> str:
    """A value as in the YAML that held it, short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value)


def join(*parts: int | str) -> str:
    """`("data", "train", 0, "path")` -> `data.train.0.path`."""
    return ".".join(str(part) for part in parts if part != "")
