"""Stages on one CPU rank that are killed at random points: do they end with the same weights and moments as undisturbed ones?

python benchmarks/killed_stages.py [--kills 10] [--seed 0]
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def main() -> None:
    from report import bounded, write

    from testing.killed_stages import values_that_differ

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        differ = values_that_differ(ROOT, Path(folder), args.kills, args.seed)
    case = f"three stages and an average, {args.kills} kills, seed {args.seed}"
    write("killed_stages", [bounded(case, "final values that differ", "1", differ, 0)], ("torch",))


if __name__ == "__main__":
    main()
