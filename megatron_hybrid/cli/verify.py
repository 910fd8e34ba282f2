"""Verify a checkpoint: hashes of its files, every tensor complete and finite, and optionally equal to a Hugging Face folder.

megatron-hybrid verify run/checkpoints/step-00010000
megatron-hybrid verify checkpoints/olmo-hybrid-7b --against Olmo-Hybrid-7B

Exit codes: 0 no problem found; 78 problems, one per line, a file that could not be read, or not a checkpoint.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from megatron_hybrid.base.errors import BAD_INPUT
from megatron_hybrid.config.command_line import CommandLine
from megatron_hybrid.convert.verify import verify


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder with index.json")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="HF_DIR",
        help="compare every tensor with this folder's (default: no comparison)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit status."""
    a = parse_arguments(argv)
    try:
        with Progress(console=Console(stderr=True), disable=a.quiet) as bar:
            size = sum(path.stat().st_size for path in a.checkpoint.glob("*.safetensors"))
            task = bar.add_task("verifying", total=2 * size)
            verdict = verify(a.checkpoint, a.against, lambda count: bar.advance(task, count))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    for problem in verdict.problems:
        print(f"wrong: {problem}", file=sys.stderr)
    compared = f", {verdict.compared} compared" if a.against else ""
    compared += f" ({verdict.rounded} in the narrower of two types)" if verdict.rounded else ""
    state = f"{len(verdict.problems)} problems" if verdict.problems else "all is well"
    print(
        f"{a.checkpoint}: {verdict.files} files, {verdict.tensors} tensors, {verdict.nbytes / 1e9:.2f} GB{compared}: {state}"
    )
    return BAD_INPUT if verdict.problems else 0
