"""Downstream tasks of a checkpoint by this package and by lm-eval with our model, and of its export by lm-eval's `hf` backend.

python benchmarks/task_parity.py        needs the packages of lm_eval[hf]; one CPU, a minute or two
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
LIMIT = 60


def main() -> None:
    from report import row, write

    from testing.task_parity import by_hf_backend, figures, make_models, make_tasks, ours

    with tempfile.TemporaryDirectory() as name:
        checkpoint, export = make_models(Path(name))
        tasks = make_tasks(Path(name))
        own, harness = (figures(ours(checkpoint, tasks, LIMIT, lm_eval)) for lm_eval in (False, True))
        peer = figures(by_hf_backend(export, tasks, LIMIT))
    rows = []
    for (task, metric), value in peer.items():
        for evaluator, found in (("our evaluator", own), ("lm-eval, our model", harness)):
            rows.append(row(f"{task}, {evaluator}", metric, "", found[task, metric], value, "lm-eval, hf backend", 1.0))
            rows[-1]["met"] = found[task, metric] == value
    write("task_parity", rows, ("torch", "transformers", "lm_eval"))
    assert all(entry["met"] for entry in rows), "an evaluator differs"


if __name__ == "__main__":
    main()
