"""Command lines that start a command of this package in a process of its own."""

import sys
from collections.abc import Sequence


def process_arguments(words: Sequence[str]) -> list[str]:
    """Return the arguments of a process that runs `megatron-hybrid WORDS` with this Python.

    `-P` keeps the current folder off the module path, as for the installed command.
    """
    return [sys.executable, "-P", "-m", "megatron_hybrid.cli", *words]
