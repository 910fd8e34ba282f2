"""Fault-injection campaign of runs: kills, signals, hangs, values that are not finite, ranks that differ, and failing logs.

python -m tests.faults.runs --kills 100 --signals 60 --rows ROWS.json

`--hangs`, `--numbers` and `--logs` limit the other parts. Every case runs tools/pretrain.py on CPU ranks and looks at what a user
would see: exit statuses, output, and checkpoints. Prints one line per part, and exits with status 1 if any case fails.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import hangs, kills, logs, numbers, signals
from tests.faults.processes import preload


class Part:
    """Result of one part of the campaign."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.figures: dict[str, float] = {}
        self.problems: list[str] = []
        folder.mkdir()

    def expect(self, holds: bool, what: str) -> None:
        """Record a problem unless the condition holds."""
        if not holds:
            self.problems.append(what)
            print(f"  FAILED {what}", flush=True)

    def at_most(self, name: str, value: float) -> None:
        """Record the largest of several values."""
        self.figures[name] = max(self.figures.get(name, 0.0), round(value, 2))

    def count(self, name: str, by: int = 1) -> None:
        self.figures[name] = self.figures.get(name, 0) + by


PARTS: dict[str, tuple[Callable[[Any, int], None], int, int]] = {
    "kills": (kills.run, 100, 10**6),
    "signals": (signals.run, 60, 10**6),
    "hangs": (hangs.run, len(hangs.CASES), len(hangs.CASES)),
    "numbers": (numbers.run, len(numbers.CASES), len(numbers.CASES)),
    "logs": (logs.run, len(logs.CASES), len(logs.CASES)),
}
"""Function, default number of cases, and largest number."""


def _rows(part: str, figures: dict[str, float], failed: int) -> list[dict[str, Any]]:
    """Return rows of a result file."""
    found = [{"case": part, "metric": name, "unit": "", "ours": value, "goal": None} for name, value in figures.items()]
    return [*found, {"case": part, "metric": "cases that failed", "unit": "", "ours": failed, "goal": 0}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (_, default, most) in PARTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"cases (default {default}, at most {most})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="append rows of a result file to this JSON file")
    arguments = parser.parse_args()
    preload()
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for name, (run, _, most) in PARTS.items():
            if not (count := min(getattr(arguments, name), most)):
                continue
            part, begin = Part(Path(folder) / name, arguments.seed), time.monotonic()
            run(part, count)
            seconds = round(time.monotonic() - begin)
            print(f"{name} ({seconds} s): {part.figures}, {count} cases, {len(part.problems)} failed", flush=True)
            rows += _rows(name, part.figures | {"cases": count, "seconds for all cases": seconds}, len(part.problems))
            failed |= bool(part.problems)
    if arguments.rows:
        before = json.loads(arguments.rows.read_text()) if arguments.rows.exists() else []
        arguments.rows.write_text(json.dumps([*before, *rows]))
    sys.exit(failed)


if __name__ == "__main__":
    main()
