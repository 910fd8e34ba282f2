"""Dispatch of `megatron-hybrid COMMAND ...`. Only the module of the called command is imported."""

import gc
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from megatron_hybrid import __version__
from megatron_hybrid.base.output import quiet_on_closed_pipe
from megatron_hybrid.base.permanent_imports import permanent_imports
from megatron_hybrid.cli.table import COMMANDS, find_command

PROGRAM = "megatron-hybrid"
_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status. The command reads its own arguments from `sys.argv`."""
    with quiet_on_closed_pipe():
        return _run(list(sys.argv[1:] if argv is None else argv))


def run_tool(command: Callable[[], int | None]) -> NoReturn:
    """Run a command as a script of its own (tools/), and exit with its status."""
    gc.freeze()  # the command's imports: see permanent_imports
    with quiet_on_closed_pipe():
        sys.exit(command())


def _run(words: list[str]) -> int:
    found = find_command(words)
    if found is None:
        return _without_command(words)
    name, rest = found
    command = COMMANDS[name]
    if command.stops_gracefully:
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # pending until the command handles them
    sys.argv = [f"{PROGRAM} {name}", *rest]  # the name in usage and messages
    with permanent_imports():
        module = import_module(f"megatron_hybrid.cli.{command.module}")
    status: int | None = module.main()
    return status or 0


def overview(group: str = "") -> str:
    """Return the help text: all commands, or those of a group such as `convert`."""
    names = [name for name in COMMANDS if name.startswith(group)]
    width = max(map(len, names))
    lines = [f"  {name:<{width}}  {COMMANDS[name].summary}" for name in names]
    head = f"usage: {PROGRAM} {f'{group} ' if group else ''}COMMAND ...\n"
    what = "" if group else "\nPretrain hybrid language models on megatron-core.\n"
    tail = f"`{PROGRAM} COMMAND --help` describes a command.{'' if group else ' `--version` prints the version.'}"
    return "\n".join([f"{head}{what}", "commands:", *lines, "", tail])


def _without_command(words: list[str]) -> int:
    """Answer `--help` and `--version`, or say what is wrong."""
    group = words[0] if words and any(name.startswith(f"{words[0]} ") for name in COMMANDS) else ""
    asked = words[1:] if group else words
    if asked[:1] == ["--version"] and not group:
        print(f"{PROGRAM} {__version__}")
        return 0
    if asked[:1] in (["--help"], ["-h"], ["help"]):
        print(overview(group))
        return 0
    if not asked:
        print(overview(group), file=sys.stderr)
    else:
        from megatron_hybrid.base import nearest

        wrong = f"{group} {asked[0]}".strip()
        hint = nearest.word(wrong, [*COMMANDS], cutoff=0.6)
        remedy = f"did you mean {hint}?" if hint else f"commands are listed by {PROGRAM} --help"
        print(f"{PROGRAM}: {wrong}: no such command; {remedy}", file=sys.stderr)
    from megatron_hybrid.base.errors import BAD_INPUT

    return BAD_INPUT
