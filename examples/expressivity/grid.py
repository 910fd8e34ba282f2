"""Train the grid of models, learning rates and seeds of a task, several runs per GPU, and report the accuracies.

To resume, call it again: finished runs stay, and the others continue from their newest checkpoint. SIGTERM and Ctrl-C stop all runs
with a checkpoint. Exit codes: 0 all runs are finished; 75 stopped before; 1 a run failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from megatron_hybrid.base.errors import REQUEUE, no_traceback  # noqa: E402
from megatron_hybrid.config.load import load_run  # noqa: E402
from megatron_hybrid.config.run import RunConfig  # noqa: E402
from megatron_hybrid.observe.metrics import read_metrics  # noqa: E402

MODELS = ("hybrid_negative", "gdn_negative", "transformer", "gdn_positive", "hybrid_positive")
TASKS = ("state_tracking", "recall", "state_based_recall", "state_tracking_small")
STOPPING_S = 20.0
"""Seconds before the time limit at which runs are asked to save and stop."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run of the grid."""

    model: str
    overrides: tuple[str, ...]
    config: RunConfig
    task: Path

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def is_finished(self) -> bool:
        path = self.folder / "metrics.jsonl"
        steps = [record["step"] for record in read_metrics(path)] if path.exists() else []
        return bool(steps) and steps[-1] >= self.config.train.steps

    def start(self, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start the run. Its output goes to log.txt in its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "tools/pretrain.py", str(self.task), *self.overrides]
        with open(self.folder / "log.txt", "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


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
        folder = Path(arguments.runs) / arguments.task / f"{model}-lr{lr:g}-{kind}-seed{seed}"
        own = [f"run_dir={folder.resolve()}", f"train.seed={seed}", f"data.seed={seed}", f"train.optimizer.lr={lr}"]
        own += [f"train.schedule.kind={kind}", *model_overrides(model, base.model.layer_pattern)]
        overrides = (*own, *arguments.overrides)
        yield Run(model, overrides, load_run(str(task), list(overrides)), task)


class Scheduler:
    """Keeps every slot of the GPUs, or of the CPU, busy with a run."""

    def __init__(self, runs: Sequence[Run], gpus: int, per_device: int, deadline: float) -> None:
        self.waiting = [run for run in runs if not run.is_finished]
        self.slots = [number % max(gpus, 1) for number in range(max(gpus, 1) * per_device)]
        self.gpus, self.deadline, self.stopping = gpus, deadline, False
        self.running: dict[Run, tuple[subprocess.Popen[bytes], int]] = {}
        self.failed: list[Run] = []

    def work(self) -> None:
        """Train until all runs are finished, or until the deadline or a signal. All runs have ended on return."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())
        while self.running or (self.waiting and not self.stopping):
            while self.waiting and self.slots and not self.stopping:
                self._start(self.waiting.pop(0), self.slots.pop(0))
            time.sleep(0.5)
            if time.monotonic() > self.deadline:
                self.stop()
            for run, (process, slot) in list(self.running.items()):
                if process.poll() is not None:
                    self._end(run, process.returncode, slot)

    def stop(self) -> None:
        """Ask all runs to save and stop, once."""
        if not self.stopping:
            self.stopping = True
            for process, _ in self.running.values():
                process.send_signal(signal.SIGTERM)

    def _start(self, run: Run, slot: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = _visible_gpus()[slot]
        self.running[run] = run.start(environment), slot

    def _end(self, run: Run, status: int, slot: int) -> None:
        del self.running[run]
        self.slots.append(slot)
        if status == 0:
            print(f"{run.folder.name}: finished", flush=True)
        elif not (self.stopping and status in (REQUEUE, -signal.SIGTERM)):
            self.failed.append(run)
            print(f"{run.folder.name}: failed with status {status}; see {run.folder / 'log.txt'}", flush=True)


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(64)]


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
    from expressivity import report

    begin, arguments = time.monotonic(), parse()
    with no_traceback():
        runs = list(grid(arguments))
    per_device = arguments.runs_per_gpu or (6 if arguments.gpus else os.cpu_count() or 1)
    scheduler = Scheduler(runs, arguments.gpus, per_device, begin + arguments.time_limit - STOPPING_S)
    print(f"{len(runs)} runs, {len(runs) - len(scheduler.waiting)} of them finished before", flush=True)
    scheduler.work()
    report(arguments.task, [(run.model, run.folder) for run in runs], arguments.out)
    unfinished = sum(not run.is_finished for run in runs)
    sys.exit(1 if scheduler.failed else REQUEUE if unfinished else 0)


if __name__ == "__main__":
    main()
