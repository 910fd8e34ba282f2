"""Tables and the figure of the scaling law in docs/results/paper.md, from the result files: `python benchmarks/tables.py` calls it."""

import re
from functools import partial
from pathlib import Path

import numpy as np
from pages import NOT_RUN, PAGE, MakeTable, newest_result

result = partial(newest_result, "scaling")
COLORS = {"transformer": "#6b7280", "hybrid": "#2563eb", "gdn": "#ea580c"}
LABELS = {"transformer": "transformer", "hybrid": "hybrid 3:1", "gdn": "pure GDN"}
FREE = "fitted exponents"
FIXED = "alpha = 0.22, beta = 0.22"
SAVING = re.compile(r"token saving at N = (\d+)")
SAVING_AT, SAVING_OF = re.compile(r"token saving at ([\d.e+-]+x)"), re.compile(r"token saving, (\w+)")
"""Savings between endpoints: at a budget, and of a validation set or their mean."""
OPTIMAL = re.compile(r"compute-optimal loss at (1e\d+) FLOPs")
INTERPOLATED = re.compile(r"(\w+), (\S+), interpolated")
PAPER_SIZE = 1_000_000_000
"""Smallest size whose token saving the paper prints."""
MARKERS = "osD^vPX*"
MOST_SAVED = 4.0
"""Upper end of the figure's savings. Savings with an interval beyond it are left out: the points do not determine them."""

Values = dict[str, dict[str, dict]]
"""Rows by case and metric."""


def values_of(found: dict) -> Values:
    """Return the rows of a result file by case and metric."""
    values: Values = {}
    for row in found["rows"]:
        values.setdefault(row["case"], {})[row["metric"]] = row
    return values


def points_of(values: Values) -> dict[str, dict[str, dict[str, float]]]:
    """Return the metrics of each point by architecture and `size, budget`."""
    points: dict[str, dict[str, dict[str, float]]] = {}
    for case, metrics in values.items():
        if "training" in metrics:
            architecture, _, name = case.partition(", ")
            points.setdefault(architecture, {})[name] = {metric: row["ours"] for metric, row in metrics.items()}
    return points


def points(table: MakeTable) -> str:
    """Loss of every size and budget by architecture."""
    if (found := result()) is None:
        return NOT_RUN
    by_architecture = points_of(values_of(found))
    head = [f"d/heads/layers, budget; {found['machine']}", "N", "tokens", "epochs"]
    rows = []
    for name, first in next(iter(by_architecture.values())).items():
        sizes = (f"{first[metric] / 1e6:,.1f}M" for metric in ("parameters", "tokens"))
        cells = [name, *sizes, _number(first["epochs"], ".1f")]
        for own in by_architecture.values():
            point = own.get(name, {})
            cells += [_number(point.get("loss"), ".4f"), _number(point.get("bits per byte"), ".4f")]
        rows.append(cells)
    head += [text for name in by_architecture for text in (f"loss, {LABELS[name]}", "bits per byte")]
    return f"{table(head, rows)}\n![Loss over FLOPs, and tokens saved over size](scaling.svg)\n"


def laws(table: MakeTable) -> str:
    """Constants of the laws with intervals, next to the paper's."""
    if (found := result()) is None:
        return NOT_RUN
    values, rows = values_of(found), []
    for kind in (FREE, FIXED):
        for architecture, label in LABELS.items():
            metrics = values.get(f"{architecture}, {kind}", {})
            if not metrics:
                continue
            cells = [_with_interval(metrics, name) for name in ("E", "A", "alpha", "B", "beta")]
            rows.append([label, kind, *(cell or "fixed" for cell in cells)])
    return table(["model", "fit", "E", "A", "alpha", "B", "beta"], rows)


def optimal(table: MakeTable) -> str:
    """Compute-optimal losses by FLOPs, next to the paper's."""
    if (found := result()) is None:
        return NOT_RUN
    values, rows, head = values_of(found), [], list[str]()
    for architecture, label in LABELS.items():
        metrics = values.get(f"{architecture}, {FREE}", {})
        names = [name for name in metrics if OPTIMAL.fullmatch(name)]
        if names:
            head = [f"{match[1]} FLOPs" for name in names if (match := OPTIMAL.fullmatch(name))]
            rows.append([label, *(_with_interval(metrics, name) for name in names)])
    return table(["compute-optimal loss", *head], rows) if rows else "Too few points for fitted exponents.\n"


def savings(table: MakeTable) -> str:
    """Token savings against the transformer by size, next to the paper's."""
    if (found := result()) is None:
        return NOT_RUN
    values = values_of(found)
    kinds = [(architecture, kind) for kind in (FREE, FIXED) for architecture in ("hybrid", "gdn")]
    by_kind = {key: values.get(", ".join(key), {}) for key in kinds}
    names = {name for metrics in by_kind.values() for name in metrics}
    sizes = sorted(int(match[1]) for name in names if (match := SAVING.fullmatch(name)))
    rows = [
        [LABELS[architecture], kind, *(_with_interval(metrics, f"token saving at N = {size}", ".2f") for size in sizes)]
        for (architecture, kind), metrics in by_kind.items()
        if metrics
    ]
    return table(["tokens saved", "fit", *(f"N = {_millions(size)}" for size in sizes)], rows)


def interpolated(table: MakeTable) -> str:
    """Token savings against the transformer by size, between the endpoints: at the highest budget, and at each of them."""
    if (found := result()) is None:
        return NOT_RUN
    savings = _interpolated(values_of(found))
    names = list(dict.fromkeys(name for *_, metrics in savings for name in metrics))
    by_budget = {name: match[1] for name in names if (match := SAVING_AT.fullmatch(name))}
    columns = {name: by_budget[name] for name in sorted(by_budget, key=lambda name: float(by_budget[name][:-1]))}
    columns |= {
        name: match[1].replace("mean", "mean of both") for name in names if (match := SAVING_OF.fullmatch(name))
    }
    rows = []
    for architecture, size, metrics in savings:
        cells = [_number(metrics[name]["ours"], ".2f") if name in metrics else "" for name in columns]
        rows.append([LABELS[architecture], size, f"{metrics['parameters']['ours'] / 1e6:.1f}M", *cells])
    return table(["tokens saved", "d/heads/layers", "N", *columns.values()], rows)


def keys(table: MakeTable) -> str:
    """Losses and tokens saved with wider keys in Gated DeltaNet, at the largest budget that both ladders have."""
    if (found := newest_result("scaling_keys")) is None:
        return NOT_RUN
    values = values_of(found)
    last = {case.rpartition(", ")[0]: case for case, metrics in values.items() if "loss" in metrics}
    rows = []
    for name, case in last.items():
        architecture, _, size = name.partition(", ")
        loss, saved = values[case]["loss"], values.get(f"{name}, interpolated", {}).get("token saving, mean", {})
        cells = [f"{LABELS[architecture]}, {size}, {case.rpartition(', ')[2]}"]
        cells += [_number(loss[who], ".3f") for who in ("peer", "ours")]
        rows.append([*cells, *(_number(saved.get(who), ".2f") for who in ("peer", "ours"))])
    head = ["model, d/heads/layers, budget", "loss, keys of 64", "loss, keys of 128"]
    return table([*head, "tokens saved, keys of 64", "tokens saved, keys of 128"], rows)


def claim() -> list[list[str]]:
    """Rows of the paper's claim on tokens: label, machine, the hybrid's range between endpoints, and the paper's value."""
    if (found := result()) is None:
        return []
    values = values_of(found)
    own = [metrics for name, _, metrics in _interpolated(values) if name == "hybrid"]
    sizes, savings = ([metrics[name]["ours"] for metrics in own] for name in ("parameters", "token saving, mean"))
    known = [saving for saving in savings if saving is not None]
    if not known:
        return []
    range_of_sizes = f"{min(sizes) / 1e6:.0f}M to {max(sizes) / 1e6:.0f}M parameters"
    of_law = values.get(f"hybrid, {FREE}", {}).get(f"token saving at N = {PAPER_SIZE}")
    paper = "-" if of_law is None else f"{of_law['peer']:g} at {_millions(PAPER_SIZE)}"
    label = f"tokens of a transformer over a hybrid's at the last loss, {range_of_sizes}"
    return [[label, found["machine"], f"{min(known):.2f} to {max(known):.2f}", paper]]


def _interpolated(values: Values) -> list[tuple[str, str, dict[str, dict]]]:
    """Return architecture, size and metrics of the savings between endpoints."""
    found = [(INTERPOLATED.fullmatch(case), metrics) for case, metrics in values.items()]
    return [(match[1], match[2], metrics) for match, metrics in found if match]


def corpus(table: MakeTable) -> str:
    """Bytes and tokens of the corpus."""
    if (found := newest_result("scaling_corpus")) is None:
        return NOT_RUN
    rows = []
    for case, metrics in values_of(found).items():
        rows.append([case, *(f"{metrics[name]['ours']:,}" for name in ("files", "bytes", "tokens"))])
    return table(["set", "files", "bytes", "tokens"], rows)


def _with_interval(metrics: dict[str, dict], name: str, form: str = ".4g") -> str:
    if name not in metrics:
        return ""
    value, low, high = (metrics[key]["ours"] for key in (name, f"{name}, low", f"{name}, high"))
    paper = metrics[name]["peer"]
    text = f"{_number(value, form)} [{_number(low, form)}, {_number(high, form)}]"
    return text if paper is None else f"{text} ({paper:g})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _millions(size: float) -> str:
    return f"{size / 1e9:g}B" if size >= 1e9 else f"{size / 1e6:g}M"


def draw(found: dict, folder: Path = PAGE) -> None:
    """Draw loss over FLOPs and tokens saved over size as scaling.svg, which does not change when it is drawn again."""
    import matplotlib
    from matplotlib.figure import Figure

    figure, values = Figure(figsize=(11, 4.4), layout="constrained"), values_of(found)
    left, right = figure.subplots(1, 2)
    _draw_losses(left, values)
    _draw_savings(right, values)
    for axis in (left, right):
        axis.grid(True, color="#e5e7eb", linewidth=0.6)
        axis.legend(frameon=False, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "scaling"}):
        figure.savefig(folder / "scaling.svg", metadata={"Date": None})


def _draw_losses(axis, values: Values) -> None:
    for architecture, own in points_of(values).items():
        sizes = list(dict.fromkeys(name.split(", ")[0] for name in own))
        for number, size in enumerate(sizes):
            line = [(point["training"], point["loss"]) for name, point in own.items() if name.startswith(f"{size}, ")]
            label, marker = None if number else LABELS[architecture], MARKERS[number % len(MARKERS)]
            style = dict(color=COLORS[architecture], marker=marker, markersize=4, linewidth=1, label=label)
            axis.plot(*zip(*line, strict=True), **style)
        metrics = values.get(f"{architecture}, {FREE}", {})
        optimal = [(float(m[1]), row["ours"]) for name, row in metrics.items() if (m := OPTIMAL.fullmatch(name))]
        if optimal:
            axis.plot(*zip(*optimal, strict=True), color=COLORS[architecture], linewidth=1, linestyle="--")
    axis.set(xlabel="FLOPs of training", ylabel="loss (nats per token)", xscale="log")
    axis.set_title("loss at the endpoints; dashed: compute-optimal, C = 6 N D", fontsize=10)


def _draw_savings(axis, values: Values) -> None:
    for architecture in ("hybrid", "gdn"):
        for kind, line in ((FREE, "-"), (FIXED, "--")):
            metrics = values.get(f"{architecture}, {kind}", {})
            named = [(int(m[1]), name) for name in metrics if (m := SAVING.fullmatch(name))]
            names = [(size, name) for size, name in named if metrics[f"{name}, high"]["ours"] <= MOST_SAVED]
            if not names:
                continue
            sizes, columns = [size for size, _ in names], ("", ", low", ", high")
            value, low, high = ([metrics[name + end]["ours"] for _, name in names] for end in columns)
            label = f"{LABELS[architecture]}, {kind}"
            axis.plot(sizes, value, color=COLORS[architecture], linestyle=line, marker=".", label=label)
            axis.fill_between(sizes, low, high, color=COLORS[architecture], alpha=0.12)
            paper = [(size, metrics[name]["peer"]) for size, name in named if metrics[name]["peer"] is not None]
            if kind == FREE and paper:
                style = dict(markersize=9, markerfacecolor="none", color="#111827", label="the paper's hybrid")
                axis.plot(*zip(*paper, strict=True), "o", **style)
        _draw_interpolated(axis, values, architecture)
    axis.axhline(1, color="#9ca3af", linewidth=1)
    low, high = axis.get_ylim()
    axis.set(xlabel="parameters without embeddings", ylabel="tokens saved (x)", xscale="log")
    axis.set_ylim(max(0.0, low), min(MOST_SAVED, np.nextafter(high, np.inf)))
    axis.set_title("tokens of the transformer over those of the model at equal loss", fontsize=10)


def _draw_interpolated(axis, values: Values, architecture: str) -> None:
    own = [metrics for name, _, metrics in _interpolated(values) if name == architecture]
    pairs = [tuple(metrics[name]["ours"] for name in ("parameters", "token saving, mean")) for metrics in own]
    if known := [pair for pair in pairs if None not in pair]:
        label = f"{LABELS[architecture]}, interpolated"
        axis.plot(*zip(*known, strict=True), "D", markersize=5, color=COLORS[architecture], label=label)


def write() -> None:
    """Draw the figure, if there is a result file."""
    if (found := result()) is not None:
        draw(found)
