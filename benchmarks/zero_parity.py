"""DeepSpeed's ZeRO against one rank of megatron-core's engine: 20 steps of a tiny hybrid, fp32, on CPU ranks over gloo; and against
itself, saved at step 10 and resumed.

python benchmarks/zero_parity.py
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
MESHES = {"TP1 x DP2": (2, 1), "TP2 x DP1": (2, 2), "TP2 x DP2": (4, 2)}  # name: (ranks, tensor parallel size)
GOAL = 1e-4
CURVE = dict(steps=20, lr=3e-3)


def main() -> None:
    from report import bounded, write

    from testing import jobs
    from testing.layouts import MODEL, TRAIN, layout, relative_difference
    from testing.ranks import RankPool
    from testing.zero import run, values_that_differ

    pool, rows = RankPool(), []
    (expected,) = pool.run(jobs.curve, 1, model=MODEL, parallel=layout(), train=TRAIN, **CURVE)
    for stage in (1, 2, 3):
        for mesh, (count, tensor_parallel) in MESHES.items():
            case, zero, parallel = f"ZeRO {stage}, {mesh}", {"stage": stage}, layout(tensor_parallel)
            straight = run(pool, count, zero, parallel, **CURVE)
            for what, metric in (("losses", "loss"), ("norms", "gradient norm")):
                worst = max(relative_difference(found[what], expected[what]) for found in straight)
                rows.append(bounded(case, f"largest relative difference of the {metric}", "", worst, GOAL))
            with tempfile.TemporaryDirectory() as folder:
                first = run(pool, count, zero, parallel, **CURVE | {"steps": 10}, save=folder)
                second = run(pool, count, zero, parallel, **CURVE, start=10, load=first[0]["path"])
            differ = values_that_differ(straight, first, second)
            rows.append(bounded(case, "losses, norms and parameters that differ after resuming", "", differ, 0))
    eps = TRAIN["optimizer"]["eps"]
    notes = [
        f"{MODEL['layer_pattern']}, {MODEL['hidden_size']} wide; AdamW with eps {eps}: a smaller one makes rounding visible."
    ]
    write("zero_parity", rows, ("torch", "megatron-core", "deepspeed"), notes=notes)


if __name__ == "__main__":
    main()
