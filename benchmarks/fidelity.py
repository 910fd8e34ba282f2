"""Difference of our model's logits and gradients from transformers' with the same weights, in fp32 on the CPU, and from one rank
under tensor parallelism with padded heads.

python benchmarks/fidelity.py
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    from report import bounded, write

    from testing.fidelity import CASES, compare
    from testing.ranks import RankPool

    pool, rows = RankPool(), []
    for name in CASES:
        logits, gradients = compare(name, pool)
        worst = max(gradients, key=gradients.__getitem__)
        rows.append(bounded(name, "logits: relative error (L2)", "", logits, 1e-5))
        rows.append(bounded(name, f"gradients: worst relative error (L2), of {worst}", "", gradients[worst], 1e-4))
    write("fidelity", rows, ("torch", "megatron-core", "transformers"))


if __name__ == "__main__":
    main()
