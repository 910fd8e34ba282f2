"""Shared parts of the conversion commands: options, a progress bar, and errors without a traceback."""

import argparse
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_hybrid.base.errors import BAD_INPUT, INTERRUPTED
from megatron_hybrid.convert.job import Conversion, how_to_resume, run
from megatron_hybrid.convert.ranks import Ranks, find_ranks

DTYPES = {"fp32": "F32", "bf16": "BF16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Parse a size: `5GB` is 5,000,000,000."""
    match = re.fullmatch(r"([0-9]{1,12})\s*([KMG]I?B)?", text.strip().upper())
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2] or ""]


def convert(plan: Callable[[], Conversion], target: Path, quiet: bool = False) -> int:
    """Plan and run a conversion on every rank, and return the exit status."""
    ranks = Ranks()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # sent by a batch system: report how to resume
    try:
        ranks = find_ranks()
        conversion = _plan(plan, ranks)
        _run(conversion, ranks, quiet)
    except (ValueError, OSError) as error:
        if ranks.rank == 0:
            print(f"error: {error}", file=sys.stderr)
            if isinstance(error, OSError):
                print(how_to_resume(target), file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        if ranks.rank == 0:
            print(f"interrupted: {how_to_resume(target)}", file=sys.stderr)
        return INTERRUPTED
    if ranks.rank == 0:
        for note in conversion.notes:
            print(f"note: {note}", file=sys.stderr)
        print(f"{target}: {conversion.nbytes / 1e9:.2f} GB in {len(conversion.files)} files")
    return 0


def _plan(plan: Callable[[], Conversion], ranks: Ranks) -> Conversion:
    """Plan the conversion. If planning fails on one rank, all ranks raise."""
    planned, error = None, None
    try:
        planned = plan()
    except (ValueError, OSError) as failure:
        error = failure
    ranks.agree(error)
    assert planned is not None
    return planned


def _run(conversion: Conversion, ranks: Ranks, quiet: bool) -> None:
    """Run the conversion with a progress bar."""
    title = "converting" if ranks.size == 1 else f"converting (files of rank 0 of {ranks.size})"
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet or ranks.rank > 0) as bar:
        task = bar.add_task("", total=None)

        def progress(total: int) -> Callable[[int], None]:
            bar.update(task, total=total)
            return lambda count: bar.advance(task, count)

        run(conversion, ranks, progress)
