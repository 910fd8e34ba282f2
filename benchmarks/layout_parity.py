"""Difference of the loss and gradient-norm curves of every layout from one rank, fp32, on CPU ranks over gloo: 20 steps, or 4 of
peri-norm blocks.

python benchmarks/layout_parity.py [--model qwen|small]
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--model",
        default="hybrid",
        choices=["hybrid", "qwen", "small"],
        help="blocks of OLMo Hybrid, of Qwen3.5, or of AI2's small suite",
    )
    of = parser.parse_args().model
    from report import bounded, write

    from testing import jobs
    from testing.layouts import (
        DEEP,
        LAYOUTS,
        MODEL,
        PERI_NORM,
        PERI_NORM_LR,
        PERI_NORM_STEPS,
        QWEN,
        SHALLOW,
        TOLERANCE,
        few_micro_batches,
        layout,
        relative_difference,
        smallest_pattern,
    )
    from testing.ranks import RankPool

    pool, model = RankPool(), {"hybrid": MODEL, "qwen": QWEN, "small": PERI_NORM}[of]
    length = dict(steps=PERI_NORM_STEPS, lr=PERI_NORM_LR) if of == "small" else dict(steps=20)

    def curve(count, pattern, parallel):
        changed = model | {"layer_pattern": pattern}
        return pool.run(
            jobs.curve, count, model=changed, parallel=parallel, train=few_micro_batches(count, parallel), **length
        )[0]

    one = {pattern: curve(1, pattern, layout()) for pattern in ("GA", SHALLOW, DEEP)}
    rows = []
    for name, (count, parallel) in LAYOUTS.items():
        pattern = smallest_pattern(parallel)
        found = curve(count, pattern, parallel)
        for what, metric in (("losses", "loss"), ("norms", "gradient norm")):
            worst = relative_difference(found[what], one[pattern][what])
            rows.append(
                bounded(f"{name} ({count} ranks)", f"largest relative difference of the {metric}", "", worst, TOLERANCE)
            )
    write("layout_parity" if of == "hybrid" else f"layout_parity_{of}", rows, ("torch", "megatron-core"))


if __name__ == "__main__":
    main()
