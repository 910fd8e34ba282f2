"""Losses and tokens saved by hybrid and Gated DeltaNet with keys of 128 channels, next to those with keys of 64.

It reads the points of two ladders: `ladder.py --key-head-dim 128 --runs FOLDER` trains the one with wider keys.
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
from shapes import ARCHITECTURES  # noqa: E402

MEASURED = ROOT / "benchmarks" / "measured"
BASELINE = "keys of 64"
COMMAND = (
    "python examples/scaling/ladder.py --gpus 1 --mps --sizes 384/6/4 --budgets 0.25 0.5 1 --architectures hybrid gdn "
    "--key-head-dim 128 --runs runs/scaling_keys_128"
)


def rows_of(baseline: Sequence[Point], wider: Sequence[Point]) -> Iterator[dict]:
    """Yield losses next to the baseline's and the transformer's at the same size and budget, then the tokens saved.

    Args:
        baseline: points of a ladder, with its transformers.
        wider: points of the same sizes and budgets, without transformers.

    Raises:
        ValueError: the baseline lacks a point.
    """
    known = {(point.architecture, point.size, point.budget): point for point in baseline}
    for point in wider:
        pair = [known.get((name, point.size, point.budget)) for name in (point.architecture, ARCHITECTURES[0])]
        if None in pair:
            raise ValueError(
                f"{point.case}: the baseline has no such point or no transformer for it; measure them first"
            )
        narrow, transformer = pair
        yield row(point.case, "parameters", "", point.parameters, narrow.parameters, BASELINE)
        yield row(point.case, "training", "FLOPs", point.flops, narrow.flops, BASELINE)
        yield row(point.case, "loss", "nats per token", point.loss, narrow.loss, BASELINE)
        yield row(point.case, "loss of the transformer", "nats per token", transformer.loss)
        for name, loss in point.losses.items():
            yield row(point.case, f"loss on {name}", "nats per token", loss, narrow.losses[name], BASELINE)
    transformers = [point for point in baseline if point.architecture == ARCHITECTURES[0]]
    peers = {(found["case"], found["metric"]): found["ours"] for found in interpolated_rows(baseline)}
    for found in interpolated_rows([*transformers, *wider]):
        if found["unit"] == "x":
            case, metric = found["case"], found["metric"]
            yield row(case, metric, "x", found["ours"], peers[case, metric], BASELINE, higher_is_better=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, default=MEASURED / "scaling", help="folder of the ladder's runs")
    parser.add_argument("--wider", type=Path, default=MEASURED / "scaling_keys_128", help="folder of the other runs")
    parser.add_argument("--out", type=Path, help="folder of the result file (default: benchmarks/results)")
    arguments = parser.parse_args()
    rows = rows_of(read_points(arguments.baseline), read_points(arguments.wider))
    origin = read_origins(path.parent for path in sorted(arguments.wider.glob("*/points.json")))
    notes = [
        "one run per architecture; Gated DeltaNet has 4 heads of 128 x 256 per layer, the baseline 4 of 64 x 128",
        "trained with overrides of the fields that --key-head-dim sets; the FFN of gdn is 688 wide, 16 more than it chooses",
    ]
    write("scaling_keys", list(rows), notes=notes, command=COMMAND, out=arguments.out, origin=origin)


if __name__ == "__main__":
    main()
