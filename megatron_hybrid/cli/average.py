"""Average checkpoints, such as two mid-training runs with different data seeds, or the newest of one run.

megatron-hybrid average runs/a/checkpoints/step-00002400 runs/b/checkpoints/step-00002400 --out averaged
megatron-hybrid average --last 4 runs/a --out averaged --moments
megatron-hybrid average --moving 4 runs/a --out runs/a/averages

The result is a checkpoint: `checkpoint.init_from` starts a run from it, and the other tools convert and evaluate it. --moving writes
a moving average: one checkpoint per step that the run has saved. While a run trains, the same command adds those that are new.
Exit codes: 0 done; 78 wrong input, or a file could not be read or written; 130 interrupted. Afterwards, the same command resumes.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import positive
from megatron_hybrid.checkpoint.format import INDEX
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.convert.average import average, newest_checkpoints, windows
from megatron_hybrid.convert.command import convert


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CKPT",
        help="folders with index.json; with --last or --moving: one run's folder",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder to create; it must not exist yet")
    add("--weights", type=float, nargs="+", metavar="W", help="weight of each checkpoint (default: equal)")
    add("--moments", action="store_true", help="also average the optimizer's moments, for checkpoint.take: moments")
    of_run = parser.add_mutually_exclusive_group()
    of_run.add_argument(
        "--last",
        type=positive,
        metavar="K",
        help="average the newest K checkpoints of the run CKPT (default: the given checkpoints)",
    )
    of_run.add_argument(
        "--moving",
        type=positive,
        metavar="K",
        help="average every K checkpoints in a row of the run CKPT, to DIR/step-N by the newest of them; skip what exists "
        "(default: one average)",
    )
    add("--quiet", action="store_true", help="no progress bar")
    found = parser.parse(argv)
    if (found.last or found.moving) and len(found.checkpoints) != 1:
        parser.error(f"--last and --moving take one run's folder, and {len(found.checkpoints)} are given")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status."""
    a = parse_arguments(argv)

    def write(folders: Callable[[], Sequence[Path]], target: Path) -> int:
        return convert(lambda: average(folders(), target, a.weights, a.moments), target, a.quiet)

    if a.moving is None:
        return write(lambda: newest_checkpoints(a.checkpoints[0], a.last) if a.last else a.checkpoints, a.out)
    with no_traceback():
        found = windows(a.checkpoints[0], a.moving)
    targets = {a.out / folders[-1].name: folders for folders in found}
    missing = [target for target in targets if not (target / INDEX).is_file()]
    for target in missing:
        if status := write(lambda target=target: targets[target], target):  # type: ignore[misc]
            return status
    if not missing:
        print(f"{a.out}: nothing to do; it has all {len(targets)} averages")
    return 0
