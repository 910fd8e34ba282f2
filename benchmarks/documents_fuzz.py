"""Random documents in slices on one, two and four ranks, against each document alone, in fp64: convolution and delta rule.

Forward and every gradient, in plain torch on the CPU. The ranks are threads of this process (testing/document_slices.py).

    python benchmarks/documents_fuzz.py [--patterns 10000]
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from report import bounded, write  # noqa: E402

from testing.document_slices import REAL, SIZES, SMALL, alone, draw, errors, errors_of_weights, in_slices  # noqa: E402

TOLERANCE = 1e-12
ROWS = {SMALL: 500, REAL: 100}
"""Patterns per call."""
SHARE = {SMALL: 0.9, REAL: 0.1}


def rows_of(sizes: tuple[int, int], patterns: int) -> list[dict]:
    """Compare patterns of one size under every number of ranks."""
    worst = {size: torch.zeros(2) for size in SIZES}
    several = continued = 0
    for seed in range(-(-patterns // ROWS[sizes])):
        case = draw(ROWS[sizes], seed, sizes)
        exact = alone(case)
        several += int((case.starts > 0).any(1).sum())
        edge = case.length // 4
        continued += int(
            (case.starts[:, [edge, 2 * edge, 3 * edge]] < torch.tensor([edge, 2 * edge, 3 * edge])).any(1).sum()
        )
        for size in SIZES:
            found = in_slices(case, size)
            now = torch.tensor([float(errors(found, exact).max()), max(errors_of_weights(found, exact).values())])
            worst[size] = torch.maximum(worst[size], now)
    done = -(-patterns // ROWS[sizes]) * ROWS[sizes]
    case = f"{done:,} patterns, {sizes[0]} tokens, chunks of {sizes[1]}"
    rows = [
        bounded(case, "patterns with a boundary", "", several, None),
        bounded(case, "patterns with a document in several of four slices", "", continued, None),
    ]
    for size in SIZES:
        of_rows, of_weights = worst[size].tolist()
        name = f"{case}, CP{size}"
        rows.append(
            bounded(name, "largest error of o and of the projection's gradient", "relative", of_rows, TOLERANCE)
        )
        rows.append(bounded(name, "largest error of the weights' gradients", "relative", of_weights, TOLERANCE))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--patterns", type=int, default=10_000)
    options, _ = parser.parse_known_args()
    found = [row for sizes in (SMALL, REAL) for row in rows_of(sizes, round(SHARE[sizes] * options.patterns))]
    write("documents_fuzz", found, ("torch",))
