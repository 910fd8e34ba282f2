"""Commands that the pages show, and a job that runs them on a trained run, in a folder with what they name."""

import contextlib
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from testing import jobs

_FENCE = re.compile(r"^```(.*)$", re.MULTILINE)
_LINE_END = re.compile(r"\\\n\s*")


def commands_of(page: Path) -> Iterator[str]:
    """Yield the commands in the shell blocks of a page, with single spaces and without comments."""
    _, *parts = _FENCE.split(page.read_text())  # language and text of each block, and what follows it, in turn
    for language, block in zip(parts[::4], parts[1::4]):
        if language not in ("", "bash"):
            continue
        for line in _LINE_END.sub(" ", block).splitlines():
            if words := shlex.split(line, comments=True, posix=False):
                yield " ".join(words)


def module_and_arguments(command: str, root: Path) -> tuple[str, list[str]] | None:
    """Return the module in megatron_hybrid/cli and the arguments of a command; None if it is no command of this package."""
    from megatron_hybrid.cli.table import COMMANDS, find_command

    words = shlex.split(command.replace("[", "").replace("]", ""))  # optional parts are given
    if words[0] == "megatron-hybrid":
        found = find_command(words[1:])
        return (COMMANDS[found[0]].module, found[1]) if found else None
    if words[0] != "python" or not words[1].startswith("tools/"):
        return None
    imported = re.search(r"from megatron_hybrid\.cli\.(\w+) import main", (root / words[1]).read_text())
    assert imported is not None, words[1]
    return imported[1], words[2:]


def run_documented(
    folder: str, byte_run: dict, word_run: dict, calls: list[tuple[str, list[str]]]
) -> list[tuple[int, str]]:
    """Train two runs in `folder`, copy checkpoints to the places that the pages name, and run commands: (status, output) of each."""
    from megatron_hybrid.cli import convert_to_hf
    from megatron_hybrid.distributed import process_groups
    from megatron_hybrid.distributed.process_groups import leave_groups

    with contextlib.chdir(folder):
        jobs.pretrain_run(byte_run)
        leave_groups()
        jobs.pretrain_run(word_run)
        (checkpoint,) = Path(word_run["run_dir"], "checkpoints").glob("step-*")
        for run, step in (("runs/a", "00010000"), ("runs/a", "00002400"), ("runs/b", "00002400")):
            shutil.copytree(checkpoint, Path(run, "checkpoints", f"step-{step}"))
        convert_to_hf.main([byte_run["run_dir"], "allenai-olmo-hybrid-7b", "--quiet"])
        stop, process_groups.stop_distributed = process_groups.stop_distributed, lambda: None
        try:
            return [_call(*call) for call in calls]
        finally:
            process_groups.stop_distributed = stop


def _call(module: str, arguments: list[str]) -> tuple[int, str]:
    from megatron_hybrid.distributed.process_groups import leave_groups

    leave_groups()
    sys.argv = [module, *arguments]
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = import_module(f"megatron_hybrid.cli.{module}").main() or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
    return status, printed.getvalue()
