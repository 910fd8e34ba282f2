"""Losses and tokens saved by hybrid and Gated DeltaNet with keys of 128 channels, next to those with keys of 64.

It reads the points of two ladders: `ladder.py --key-head-dim 64 --runs FOLDER` trains the baseline. Both have their own transformers,
whose losses show how much two runs of one model differ.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "examples" / "scaling")]

from fit import interpolated_rows  # noqa: E402
from origins import read_origins  # noqa: E402
from points import Point, read_points  # noqa: E402
from report import row, write  # noqa: E402

MEASURED = ROOT / "benchmarks" / "measured"
BASELINE = "keys of 64"
COMMAND = (
    "bash examples/scaling/run.sh --gpus 1 --mps --key-head-dim 64 --sizes 256/4/4 320/5/4 384/6/4 384/6/8 --budgets 0.25 0.5 1 "
    "--runs runs/scaling_keys_64"
)

Key = tuple[str, str, float]


def rows_of(baseline: Sequence[Point], wider: Sequence[Point]) -> Iterator[dict]:
    """Yield losses next to the baseline's at each size and budget that both ladders have, then the tokens saved there.

    Raises:
        ValueError: the ladders have no point in common.
    """
    ladders = [{_key(point): point for point in points} for points in (wider, baseline)]
    common = [key for key in ladders[0] if key in ladders[1]]
    if not common:
        raise ValueError("the two ladders have no architecture, size and budget in common; train the same ones in both")
    for key in common:
        point, other = (ladder[key] for ladder in ladders)
        yield row(point.case, "parameters", "", point.parameters, other.parameters, BASELINE)
        yield row(point.case, "training", "FLOPs", point.flops, other.flops, BASELINE)
        yield row(point.case, "loss", "nats per token", point.loss, other.loss, BASELINE)
        for name, loss in point.losses.items():
            yield row(point.case, f"loss on {name}", "nats per token", loss, other.losses[name], BASELINE)
    savings, peers = (interpolated_rows([ladder[key] for key in common]) for ladder in ladders)
    for own, peer in zip(savings, peers, strict=True):
        if own["unit"] == "x" and None not in (own["ours"], peer["ours"]):
            yield row(own["case"], own["metric"], "x", own["ours"], peer["ours"], BASELINE, higher_is_better=True)


def _key(point: Point) -> Key:
    return point.architecture, point.size, point.budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--baseline", type=Path, default=MEASURED / "scaling_keys_64", help="folder of runs with keys of 64"
    )
    parser.add_argument("--wider", type=Path, default=MEASURED / "scaling", help="folder of the other runs")
    parser.add_argument("--out", type=Path, help="folder of the result file (default: benchmarks/results)")
    arguments = parser.parse_args()
    rows = rows_of(read_points(arguments.baseline), read_points(arguments.wider))
    folders = (path.parent for path in sorted(arguments.wider.glob("*/points.json")))
    notes = ["one run per architecture and size in each ladder; the transformer of 384/6/8 is the same run in both"]
    write("scaling_keys", list(rows), notes=notes, command=COMMAND, out=arguments.out, origin=read_origins(folders))


if __name__ == "__main__":
    main()
