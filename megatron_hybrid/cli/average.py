"""Average checkpoints, such as two mid-training runs with different data seeds, or the newest of one run.

megatron-hybrid average runs/a/checkpoints/step-00002400 runs/b/checkpoints/step-00002400 --out averaged
megatron-hybrid average --last 4 runs/a --out averaged --moments

The result is a checkpoint: `checkpoint.init_from` starts a run from it, and the other tools convert and evaluate it.
Exit codes: 0 done; 1 a file could not be read or written; 78 wrong input; 130 interrupted. After 1 and 130 the same command resumes.
"""

import argparse
from pathlib import Path

from megatron_hybrid.base.numbers import positive
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.convert.average import average, newest_checkpoints
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
        help="folders with index.json; with --last: one run's folder",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder to create; it must not exist yet")
    add("--weights", type=float, nargs="+", metavar="W", help="weight of each checkpoint (default: equal)")
    add("--moments", action="store_true", help="also average the optimizer's moments, for checkpoint.take: moments")
    add(
        "--last",
        type=positive,
        metavar="K",
        help="average the newest K checkpoints of the run CKPT (default: the given checkpoints)",
    )
    add("--quiet", action="store_true", help="no progress bar")
    found = parser.parse(argv)
    if found.last and len(found.checkpoints) != 1:
        parser.error(f"--last takes one run's folder, and {len(found.checkpoints)} are given")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status."""
    a = parse_arguments(argv)

    def folders() -> list[Path]:
        return newest_checkpoints(a.checkpoints[0], a.last) if a.last else a.checkpoints

    return convert(lambda: average(folders(), a.out, a.weights, a.moments), a.out, a.quiet)
