"""Tables of docs/results/paper.md on the paper's claims, from the result files: figures.py calls them.

Those of the scaling law alone are in scaling_page.py.
"""

import re

import scaling_page
from pages import NOT_RUN, MakeTable, results_of

Accuracies = dict[int, tuple[float, float | None]]
"""Ours and the paper's by size."""


def _accuracies(result: dict) -> dict[str, Accuracies]:
    """Return the accuracies of a result file by model."""
    found: dict[str, Accuracies] = {}
    for row in result["rows"]:
        if size := re.fullmatch(r"accuracy at n = (\d+)", row["metric"]):
            found.setdefault(row["case"], {})[int(size[1])] = row["ours"], row["peer"]
    return found


def accuracies(table: MakeTable, task: str) -> str:
    """Accuracies of a task by model and size, of all result files, next to the paper's."""
    found: dict[tuple[str, str], Accuracies] = {}
    for result in results_of(f"expressivity_{task}*"):
        kind = result["benchmark"].removeprefix(f"expressivity_{task}")
        scale = {"": result["machine"], "_mixed": f"{result['machine']}, mixed sizes", "_small": "reduced, CPU"}[kind]
        found |= {(scale, model): of_size for model, of_size in _accuracies(result).items()}
    sizes = sorted({size for of_size in found.values() for size in of_size})
    rows = [[*names, *(_cell(of_size.get(size)) for size in sizes)] for names, of_size in found.items()]
    return table(["run", "model", *(f"n = {size}" for size in sizes)], rows) if rows else NOT_RUN


def _cell(accuracy: tuple[float, float | None] | None) -> str:
    if accuracy is None:
        return ""
    ours, paper = accuracy
    return f"{ours:.3f}" if paper is None else f"{ours:.3f} ({paper:g})"


def runs(table: MakeTable, task: str) -> str:
    """Accuracies of every run of a task at the largest size, on GPUs."""
    found: dict[str, dict[str, str]] = {}
    for result in results_of(f"expressivity_{task}"):
        for row in result["rows"]:
            if row["metric"].startswith("accuracy of the run"):
                model, _, settings = row["case"].partition(", lr ")
                found.setdefault(model, {})[settings] = f"{row['ours']:.3f}"
    settings = sorted({name for of_model in found.values() for name in of_model})
    rows = [[model, *(of_model.get(name, "") for name in settings)] for model, of_model in found.items()]
    return table(["model", *(f"lr {name}" for name in settings)], rows) if rows else NOT_RUN


CLAIMS = (
    ("state_tracking", "state tracking", 128, ("hybrid, negative", "GDN, negative", "transformer", "GDN, positive")),
    ("state_based_recall", "state-based recall", 128, ("hybrid, negative", "GDN, negative", "transformer")),
    ("recall_mixed", "recall, mixed sizes", 64, ("hybrid, negative", "transformer", "GDN, negative")),
)
"""Task, label, size and models of the rows of `claims`."""


def claims(table: MakeTable) -> str:
    """The paper's two claims: accuracies of hybrids and their parents, and tokens saved."""
    rows = []
    for task, label, size, models in CLAIMS:
        for result in results_of(f"expressivity_{task}"):
            of_model = _accuracies(result)
            for model in models:
                ours, paper = of_model[model][size]
                rows.append([f"accuracy, {label}, n = {size}: {model}", result["machine"], f"{ours:.3f}", f"{paper:g}"])
    return table(["claim", "machine", "here", "paper"], [*rows, *scaling_page.claim()])
