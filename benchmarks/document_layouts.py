"""Difference of training on documents under every layout from one rank: losses, gradient norms and the trained tensors, in fp32
on CPU ranks over gloo. Also the difference of packed rows from each document alone.

python benchmarks/document_layouts.py
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
PARITY = {"logits": 1e-5, "worst token": 1e-5, "gradients": 1e-4}


def layout_rows(pool) -> list[dict]:
    from report import bounded

    from testing.document_layouts import LAYOUTS, STEPS, TOLERANCES, curve, differences, one_rank_of

    rows, known = [], {}
    for name, case in LAYOUTS.items():
        if (key := one_rank_of(name)) not in known:
            (known[key],) = curve(pool, key)
        if name == key:
            continue
        for what, difference in differences(curve(pool, name), known[key]).items():
            title = f"{name} ({case['world_size']} ranks)"
            goal = TOLERANCES[what]
            rows.append(bounded(title, f"largest relative difference of {what} in {STEPS} steps", "", difference, goal))
        print(name, flush=True)
    return rows


def parity_rows(pool) -> list[dict]:
    from report import bounded

    from testing.document_parity import CASES, against_transformers, parity
    from testing.documents import RAGGED

    found = {f"{case}, alone": pool.run(parity, 1, model=model, rows=RAGGED)[0] for case, model in CASES.items()}
    found["hybrid, transformers on each document"] = against_transformers(pool)
    rows = []
    for case, errors in found.items():
        worst = {"logits": errors["logits"], "gradients": max(errors["gradients"].values())}
        if "worst token" in errors:
            worst["worst token"] = errors["worst token"]
        rows += [bounded(case, f"relative error of {what}", "", error, PARITY[what]) for what, error in worst.items()]
    return rows


def main() -> None:
    from report import write

    from testing.ranks import RankPool

    pool = RankPool()
    rows = parity_rows(pool) + layout_rows(pool)
    write("document_layouts", rows, ("torch", "megatron-core", "deepspeed", "transformers"))


if __name__ == "__main__":
    main()
