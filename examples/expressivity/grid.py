"""Train the grid of models, learning rates and seeds of a task, several runs per GPU, and report the accuracies.

To resume, call it again: finished runs stay, and the others continue from their newest checkpoint. SIGTERM and Ctrl-C stop all runs
with a checkpoint. Exit codes: 0 all runs are finished; 75 stopped before; 1 a run failed.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(HERE.parent)]

from concurrent_runs import Run, train_all  # noqa: E402
from expressivity import RunName, report  # noqa: E402

from megatron_hybrid.base.errors import REQUEUE, no_traceback  # noqa: E402
from megatron_hybrid.config.load import load_run  # noqa: E402

MODELS = ("hybrid_negative", "gdn_negative", "transformer", "gdn_positive", "hybrid_positive")
TASKS = ("state_tracking", "recall", "recall_mixed", "state_based_recall", "state_tracking_small")


def model_overrides(name: str, hybrid_pattern: str) -> list[str]:
    """Return the overrides that make one of the five models of the hybrid."""
    kind, _, sign = name.partition("_")
    if kind == "transformer":
        return [f"model.layer_pattern={'A' * len(hybrid_pattern)}", "model.gdn=null"]
    pattern = hybrid_pattern if kind == "hybrid" else "G" * len(hybrid_pattern)
    allowed = "true" if sign == "negative" else "false"
    return [f"model.layer_pattern={pattern}", f"model.gdn.allow_negative_eigenvalues={allowed}"]


def grid(arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield all runs, those of the first seed and learning rate first."""
    task = HERE / f"{arguments.task}.yaml"
    base = load_run(str(task), arguments.overrides)
    rates = arguments.lrs or [base.train.optimizer.lr]
    kinds = arguments.schedules or [base.train.schedule.kind]
    for seed, lr, kind, model in product(range(1, arguments.seeds + 1), rates, kinds, arguments.models):
        folder = Path(arguments.runs) / arguments.task / str(RunName(model, lr, kind, seed))
        own = [f"run_dir={folder.resolve()}", f"train.seed={seed}", f"data.seed={seed}", f"train.optimizer.lr={lr}"]
        own += [f"train.schedule.kind={kind}", *model_overrides(model, base.model.layer_pattern)]
        overrides = (*own, *arguments.overrides)
        yield Run(model, overrides, load_run(str(task), list(overrides)), task)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="state_tracking")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--seeds", type=int, default=1, help="seeds per model and learning rate (default: %(default)s)")
    parser.add_argument("--lrs", nargs="+", type=float, help="learning rates (default: the task's)")
    parser.add_argument("--schedules", nargs="+", choices=("cosine", "constant"), help="default: the task's")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to use (default: none, on CPU)")
    parser.add_argument(
        "--runs-per-gpu", type=int, help="runs side by side on a GPU (default 6), or on the CPU (default: cores)"
    )
    parser.add_argument("--mps", action="store_true", help="let runs share a GPU at the same time (NVIDIA MPS)")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="S", help="stop after S seconds, with checkpoints"
    )
    parser.add_argument(
        "--runs", default=str(ROOT / "runs" / "expressivity"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder of the result file and the figure (default: the project's)")
    parser.add_argument("overrides", nargs="*", help="fields of all runs: train.steps=1000")
    return parser.parse_args()


def main() -> None:
    begin, arguments = time.monotonic(), parse()
    with no_traceback():
        runs = list(grid(arguments))
    per_device = arguments.runs_per_gpu or (6 if arguments.gpus else os.cpu_count() or 1)
    failed = train_all(runs, arguments.gpus, per_device, begin + arguments.time_limit, arguments.mps)
    report(arguments.task, [run.folder for run in runs], arguments.out)
    unfinished = sum(not run.is_finished for run in runs)
    sys.exit(1 if failed else REQUEUE if unfinished else 0)


if __name__ == "__main__":
    main()
