"""Random documents in slices on one, two and four ranks, against each document alone, in fp64: convolution and delta rule.

Forward and every gradient, in plain torch on the CPU. The ranks are threads of this process (testing/document_slices.py).

    python benchmarks/documents_fuzz.py [--patterns 10000]
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from report import bounded, row, write  # noqa: E402

from testing.document_slices import (  # noqa: E402
    REAL,
    SIZES,
    SMALL,
    Case,
    alone,
    draw,
    errors,
    errors_of_weights,
    in_slices,
)

TOLERANCE, LEAK = 1e-12, 1e-3
ROWS = {SMALL: 500, REAL: 100}
"""Patterns per call."""
SHARE = {SMALL: 0.9, REAL: 0.1}


@dataclass
class Found:
    """Results of the patterns of one size so far."""

    patterns: int = 0
    with_boundary: int = 0
    across_slices: int = 0
    """Patterns in which a document is in several of four slices."""
    of_rows: dict[int, float] = field(default_factory=lambda: dict.fromkeys(SIZES, 0.0))
    """Largest error of o and of the projection's gradient, by the number of ranks."""
    of_weights: dict[int, float] = field(default_factory=lambda: dict.fromkeys(SIZES, 0.0))
    leak: float = float("inf")
    """Smallest error that a leak causes in a pattern with a boundary."""

    def add(self, case: Case) -> None:
        exact, several = alone(case), (case.starts > 0).any(1)
        edges = torch.arange(1, 4) * (case.length // 4)
        self.patterns += len(case.starts)
        self.with_boundary += int(several.sum())
        self.across_slices += int((case.starts[:, edges] < edges).any(1).sum())
        for size in SIZES:
            found = in_slices(case, size)
            self.of_rows[size] = max(self.of_rows[size], float(errors(found, exact).max()))
            self.of_weights[size] = max(self.of_weights[size], *errors_of_weights(found, exact).values())
        whole = in_slices(case, 1, documents=False)
        leaking = [x + LEAK * (y - x) for x, y in zip(exact, whole, strict=True)]
        self.leak = min(self.leak, float(errors(leaking, exact)[several].min()))

    def rows(self, sizes: tuple[int, int]) -> list[dict]:
        case = f"{self.patterns:,} patterns, {sizes[0]} tokens, chunks of {sizes[1]}"
        rows = [
            row(case, "patterns with a boundary", "", self.with_boundary),
            row(case, "patterns with a document in several of four slices", "", self.across_slices),
            row(case, f"smallest error that a leak of {LEAK:g} causes", "relative", self.leak),
        ]
        for size in SIZES:
            name = f"{case}, CP{size}"
            metric = "largest error of o and of the projection's gradient"
            rows.append(bounded(name, metric, "relative", self.of_rows[size], TOLERANCE))
            metric = "largest error of the weights' gradients"
            rows.append(bounded(name, metric, "relative", self.of_weights[size], TOLERANCE))
        return rows


def run(sizes: tuple[int, int], patterns: int) -> list[dict]:
    """Compare patterns of one size under every number of ranks."""
    found = Found()
    for seed in range(-(-patterns // ROWS[sizes])):
        found.add(draw(ROWS[sizes], seed, sizes))
    return found.rows(sizes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--patterns", type=int, default=10_000)
    options, _ = parser.parse_known_args()
    found = [x for sizes in (SMALL, REAL) for x in run(sizes, round(SHARE[sizes] * options.patterns))]
    write("documents_fuzz", found, ("torch",))
