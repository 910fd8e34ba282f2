"""How far the loss and gradient-norm curves of every layout lie from one rank's: 20 steps, fp32, on CPU ranks over gloo.

python benchmarks/layout_parity.py
"""

import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    from tests import jobs
    from tests.distributed.test_same_curve import (
        DEEP,
        LAYOUTS,
        MODEL,
        SHALLOW,
        TOLERANCE,
        TRAIN,
        layout,
        relative_difference,
    )
    from tests.ranks import RankPool

    pool = RankPool()

    def curve(count, pattern, parallel):
        return pool.run(
            jobs.curve, count, model=MODEL | {"layer_pattern": pattern}, parallel=parallel, train=TRAIN, steps=20
        )[0]

    one = {pattern: curve(1, pattern, layout()) for pattern in (SHALLOW, DEEP)}
    rows = []
    for name, (count, parallel) in LAYOUTS.items():
        deep = parallel["pipeline_parallel_size"] * parallel["virtual_pipeline_parallel_size"] > 2
        pattern = DEEP if deep else SHALLOW
        found = curve(count, pattern, parallel)
        for what, metric in (("losses", "loss"), ("norms", "gradient norm")):
            worst = relative_difference(found[what], one[pattern][what])
            rows.append(
                dict(case=f"{name} ({count} ranks)", metric=f"largest relative difference of the {metric}", unit="", ours=worst,
                     peer=None, peer_name=None, ratio=None, goal=TOLERANCE, met=worst <= TOLERANCE)
            )  # fmt: skip
            print(rows[-1]["case"], metric, f"{worst:.1e}", flush=True)
    pool.close()
    result = dict(
        benchmark="layout_parity",
        date=datetime.date.today().isoformat(),
        commit=None,
        command="python benchmarks/layout_parity.py",
        machine=f"CPU, {os.cpu_count()} cores",
        versions={"python": platform.python_version()} | {p: metadata.version(p) for p in ("torch", "megatron-core")},
        rows=rows,
    )
    (ROOT / "benchmarks/results/layout_parity-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
