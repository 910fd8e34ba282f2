"""Check the planner's exact predictions (parameters, bytes of state), and time it for 1,024 GPUs.

python benchmarks/planner_exact.py        parameters against transformers' model, bytes against those that CPU ranks allocate
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
QUESTION = ["--model", "olmo_hybrid_7b", "--gpus", "1024", "--sequence-length", "8192", "--global-batch-size", "1024"]


def parameter_rows() -> list[dict]:
    """Compare the planner's count for OLMo Hybrid 7B, without padding, with transformers', by pipeline ranks."""
    from report import bounded

    from megatron_hybrid.config.presets import olmo_hybrid_7b
    from megatron_hybrid.planner.parameters import padding_parameters, rank_parameters
    from testing.peers import transformers_count
    from testing.planner_cases import layout, plan_of

    model, rows = olmo_hybrid_7b(), []
    theirs = transformers_count(model)
    for pp in (1, 2, 4, 8):
        plan = plan_of(model, layout(pp=pp), pp)
        ours = sum(rank_parameters(plan, rank) - padding_parameters(plan, rank) for rank in range(pp))
        case = f"olmo_hybrid_7b, PP{pp}: {ours:,.0f} parameters"
        rows.append(bounded(case, "difference from transformers' model", "", abs(ours - theirs), 0))
    return rows


def state_rows() -> list[dict]:
    """Compare predicted and allocated bytes of every rank, by layout."""
    from report import bounded

    from megatron_hybrid.planner.state import rank_state
    from testing import planner_jobs as jobs
    from testing.planner_cases import CASES, plan_of
    from testing.ranks import RankPool

    pool, rows = RankPool(), []
    for name, (count, model, parallel, dtype) in CASES.items():
        plan, train = plan_of(model, parallel, count, dtype), dict(steps=1, global_batch_size=count * 4, dtype=dtype)
        differ, total = 0, 0
        for found in pool.run(jobs.state_bytes, count, model=model.model_dump(), parallel=parallel, train=train):
            state = rank_state(plan, found["pipeline_rank"], found["dp_rank"])
            for part in ("weights", "gradients", "optimizer"):
                differ += abs(getattr(state, part) - found[part])
                total += found[part]
        rows.append(bounded(f"{name} ({count} ranks)", "bytes of state that differ", f"of {total:,}", differ, 0))
    return rows


def seconds() -> float:
    """Return the seconds of one run of the tool."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "tools/tune_parallelism.py", *QUESTION], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    from report import bounded, write

    took = sorted(seconds() for _ in range(5))[2]
    case = "tools/tune_parallelism.py " + " ".join(QUESTION)
    rows = [bounded(case, "whole command, median of five", "s", took, 5), *parameter_rows(), *state_rows()]
    write("planner_exact", rows, ("torch", "megatron-core", "transformers"))


if __name__ == "__main__":
    main()
