"""Accuracies of the five models on the paper's tasks, from the runs of examples/expressivity: a result file and a figure.

bash examples/expressivity/run.sh calls it. Alone, it reports runs that exist, or the evaluations that were kept of them:
python benchmarks/expressivity.py --task state_tracking --runs benchmarks/measured/expressivity
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

LABELS = {
    "transformer": "transformer",
    "gdn_negative": "GDN, negative",
    "gdn_positive": "GDN, positive",
    "hybrid_negative": "hybrid, negative",
    "hybrid_positive": "hybrid, positive",
}
"""Models: negative and positive name the eigenvalues that are allowed."""
PAPER = {
    "state_tracking": {4: (0.512, 1, 1, 1, 1), 128: (0.230, 1, 0.223, 1, 0.363)},
    "recall": {64: (1, 0.832, 0.801, 1, 1), 128: (0.965, 0.676, 0.672, 1, 1)},
    "state_based_recall": {64: (0.629, 0.781, 0.598, 1, 0.613), 128: (0.543, 0.637, 0.574, 1, 0.570)},
}
"""Accuracies of arXiv 2604.03444, section 3.5, by size and in the order of LABELS."""
PAPER["recall_mixed"] = PAPER["recall"]
GOALS = {"state_tracking": (128, 0.99, 0.5), "state_tracking_small": (16, 0.95, 0.6)}
"""Size, the accuracy that models with negative eigenvalues must reach there, and the accuracy below which the others must stay."""


@dataclass(frozen=True)
class RunName:
    """Name of a run's folder: what differs between the runs of a task."""

    model: str
    lr: float
    schedule: str
    seed: int

    def __str__(self) -> str:
        return f"{self.model}-lr{self.lr:g}-{self.schedule}-seed{self.seed}"

    @property
    def settings(self) -> str:
        return f"lr {self.lr:g}, {self.schedule}, seed {self.seed}"

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return the name that a folder has.

        Raises:
            ValueError: the folder is not named so.
        """
        parts = re.fullmatch(r"(\w+)-lr(.+)-(\w+)-seed(\d+)", folder.name)
        if parts is None or parts[1] not in LABELS:
            raise ValueError(
                f"{folder}: its name is not MODEL-lrRATE-SCHEDULE-seedNUMBER, with one of the models {[*LABELS]}"
            )
        return cls(parts[1], float(parts[2]), parts[3], int(parts[4]))


def records_of(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl; none: the run has not begun."""
    from megatron_hybrid.observe.metrics import read_metrics

    path = folder / "metrics.jsonl"
    return list(read_metrics(path)) if path.exists() else []


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the accuracies of a run's last evaluation by size, with its step; None: it has not been evaluated."""
    records, found = records_of(folder), None
    for record in records:
        accuracies = {int(m[1]): v for key, v in record.items() if (m := re.fullmatch(r"eval/n(\d+)/accuracy", key))}
        if accuracies:
            found = {"accuracies": accuracies, "step": record["step"]}
    if found is not None:
        seconds = sorted(record["seconds"] for record in records[1:] if record.get("seconds"))
        found["seconds"] = seconds[len(seconds) // 2] if seconds else None
    return found


def keep_evaluations(task: str, folders: Iterable[Path], target: Path) -> None:
    """Write what `report` reads of runs to a folder that takes their place. For grid.py, too, finished runs are finished there.

    Args:
        target: folder of all tasks.
    """
    from origins import read_origins, write_origin

    for folder in folders:
        kept_folder = target / task / folder.name
        kept_folder.mkdir(parents=True, exist_ok=True)
        write_origin(kept_folder, read_origins([folder]))
        with open(kept_folder / "metrics.jsonl", "w") as file:
            for record in records_of(folder):
                kept = {k: v for k, v in record.items() if k in ("step", "seconds") or k.endswith("/accuracy")}
                file.write(json.dumps(kept) + "\n")


def best_runs(runs: Mapping[RunName, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the run of each model with the highest accuracy at the largest size, as the paper reports.

    With it come the number of runs, and the lowest accuracy of all runs at that size.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        other, size = found.get(name.model), max(run["accuracies"])
        accuracy = run["accuracies"][size]
        count = 1 + (other["runs"] if other else 0)
        lowest = min(accuracy, other["lowest"]) if other else accuracy
        if other is None or accuracy > other["accuracies"][size]:
            found[name.model] = run | {"folder": str(name)}
        found[name.model] |= {"runs": count, "lowest": lowest}
    return {model: found[model] for model in LABELS if model in found}


def rows_of_runs(runs: Mapping[RunName, dict[str, Any]]) -> list[dict]:
    """Return the rows of every run: its accuracy at the largest size, and its steps."""
    from report import row

    rows = []
    for name, run in runs.items():
        size = max(run["accuracies"])
        case = f"{LABELS[name.model]}, {name.settings}"
        rows.append(row(case, f"accuracy of the run at n = {size}", "share", run["accuracies"][size]))
        rows.append(row(case, "steps of the run", "", run["step"]))
    return rows


def rows_of(task: str, best: dict[str, dict[str, Any]]) -> list[dict]:
    """Return the rows of the result file."""
    from report import row

    rows = []
    for model, run in best.items():
        case = LABELS[model]
        for size, accuracy in sorted(run["accuracies"].items()):
            paper = PAPER.get(task, {}).get(size)
            peer = None if paper is None else paper[[*LABELS].index(model)]
            line = row(
                case,
                f"accuracy at n = {size}",
                "share",
                accuracy,
                peer,
                peer is not None and "paper" or None,
                None,
                True,
            )
            rows.append(line | _goal(task, model, size, accuracy))
        rows.append(row(case, f"lowest accuracy of all runs at n = {size}", "share", run["lowest"]))
        for metric, value in (("steps", run["step"]), ("median step", run["seconds"]), ("runs", run["runs"])):
            rows.append(row(case, metric, "s" if metric == "median step" else "", value))
    return rows


def _goal(task: str, model: str, size: int, accuracy: float) -> dict[str, Any]:
    """Return goal and verdict where the task has one for this size."""
    goal_size, least, most = GOALS.get(task, (None, 0.0, 0.0))
    if goal_size != size:
        return {}
    solves = model.endswith("_negative")
    return {"goal": least if solves else most, "met": accuracy >= least if solves else accuracy < most}


def draw(task: str, best: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw accuracy over size, with the paper's values as rings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for number, model in enumerate(LABELS):
        color = f"C{number}"
        if model in best:
            points = sorted(best[model]["accuracies"].items())
            style = "--" if model.startswith("gdn") else "-"  # two models may have the same accuracies
            line = dict(marker="o", markersize=4, color=color, label=LABELS[model], zorder=3 if style == "--" else 2)
            axes.plot(*zip(*points, strict=True), style, **line)
        paper = [(size, values[number]) for size, values in PAPER.get(task, {}).items()]
        if paper:
            axes.plot(*zip(*paper, strict=True), "o", markersize=11, markerfacecolor="none", color=color)
    axes.set(xlabel="n", ylabel="accuracy of the last token", title=task.replace("_", " "), ylim=(0, 1.05))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    if task in PAPER:
        figure.text(0.99, 0.005, "rings: the paper", ha="right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(task: str, folders: Sequence[Path], out: Path | None = None, command: str | None = None) -> None:
    """Write the result file and the figure of a task, and print the table.

    Args:
        folders: folders of the runs.
        out: folder of both; None: benchmarks/results and docs/results.
        command: command to record; None: the running one.
    """
    from origins import read_origins
    from report import RESULTS, write

    found = {RunName.of(folder): read_run(folder) for folder in folders}
    runs = {name: run for name, run in found.items() if run}
    best = best_runs(runs)
    if not best:
        print("no run has been evaluated yet: there is nothing to report")
        return
    origin = read_origins(folder for folder in folders if (folder / "metrics.jsonl").exists())
    notes = [f"best of {run['runs']} runs of {LABELS[model]}: {run['folder']}" for model, run in best.items()]
    words = " ".join(sys.argv[1:]) if Path(sys.argv[0]).name == "grid.py" else f"--task {task}"
    write(
        f"expressivity_{task}",
        rows_of(task, best) + rows_of_runs(runs),
        notes=notes,
        command=command or f"bash examples/expressivity/run.sh {re.sub(r'/[^ ]+', 'PATH', words)}",
        out=out or RESULTS,
        origin=origin,
    )
    suffix = "cpu" if origin.is_cpu else "gpu"
    draw(task, best, (out or ROOT / "docs" / "results") / f"expressivity_{task}-{suffix}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="state_tracking")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "expressivity")
    parser.add_argument("--out", type=Path, help="folder of the result file and the figure (default: the project's)")
    parser.add_argument("--command", help="command that trained the runs")
    parser.add_argument("--keep", type=Path, help="write the evaluations to this folder, and report nothing")
    arguments = parser.parse_args()
    folders = sorted((arguments.runs / arguments.task).glob("*-seed*"))
    if arguments.keep:
        keep_evaluations(arguments.task, folders, arguments.keep)
        return
    report(arguments.task, folders, arguments.out, arguments.command)


if __name__ == "__main__":
    main()
