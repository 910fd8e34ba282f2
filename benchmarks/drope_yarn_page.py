"""Tables and plots of docs/results/drope-yarn.md, from the result file: `python benchmarks/tables.py` calls it."""

import re
from functools import partial
from statistics import mean

from pages import PAGE, MakeTable, newest_result

result = partial(newest_result, "drope_yarn")
MODELS = {"no extension": "#9ca3af", "DroPE": "#2563eb", "YaRN": "#ea580c"}
"""Colors by model."""
NOT_MEASURED = "There is no result file yet.\n"
TRAINED_ON = {"no extension": 1024, "DroPE": 8192, "YaRN": 8192}


def recalled(found: dict, model: str) -> dict[int, dict[float, float]]:
    """Return the share of recalled numbers of a model by length and depth."""
    shares: dict[int, dict[float, float]] = {}
    for row in found["rows"]:
        if match := re.fullmatch(rf"{model}, (\d+) bytes, depth ([\d.]+)", row["case"]):
            shares.setdefault(int(match[1]), {})[float(match[2])] = row["ours"]
    return shares


def losses(found: dict, model: str) -> dict[int, float]:
    """Return the loss of a model by the first position of each bucket."""
    named = ((re.fullmatch(rf"{model}, from byte (\d+)", row["case"]), row["ours"]) for row in found["rows"])
    return {int(match[1]): value for match, value in named if match}


def retrieval(table: MakeTable) -> str:
    """Share of recalled numbers by length, over all depths, and the plot by depth."""
    if (found := result()) is None:
        return NOT_MEASURED
    rows = []
    for model in MODELS:
        shares = recalled(found, model)
        rows.append([model, *(f"{mean(by_depth.values()):.1%}" for by_depth in shares.values())])
    head = [f"numbers recalled, {found['machine']}", *(f"{length:,} bytes" for length in shares)]
    return f"{table(head, rows)}\n![Numbers recalled by length and depth](drope-yarn-retrieval.svg)\n"


def loss(table: MakeTable) -> str:
    """Mean loss before, inside and beyond the extension, and the plot by position."""
    if (found := result()) is None:
        return NOT_MEASURED
    rows = []
    for model in MODELS:
        by_position = losses(found, model)
        end = 2 * max(by_position) - sorted(by_position)[-2]
        parts = [(0, 1024), (1024, 8192), (8192, end)]
        rows.append([model, *(f"{mean(v for at, v in by_position.items() if a <= at < b):.3f}" for a, b in parts)])
    head = ["loss in nats per byte", *(f"bytes {a:,} to {b:,}" for a, b in parts)]
    return f"{table(head, rows)}\n![Loss by position](drope-yarn-loss.svg)\n"


def plot_retrieval(found: dict) -> None:
    """Draw a map of lengths and depths per model."""
    figure = new_figure(9, 3.2)
    axes = figure.subplots(1, len(MODELS), sharey=True)
    for axis, model in zip(axes, MODELS, strict=True):
        shares = recalled(found, model)
        depths = list(next(iter(shares.values())))
        values = [[shares[length][depth] for length in shares] for depth in depths]
        image = axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(shares)), [f"{length // 1024}k" for length in shares])
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axis.set_title(f"{model} (trained at {TRAINED_ON[model] // 1024}k)", fontsize=10)
        axis.set_xlabel("length in bytes")
    axes[0].set_ylabel("depth of the record")
    figure.colorbar(image, ax=axes, label="numbers recalled")
    save(figure, "drope-yarn-retrieval.svg")


def plot_loss(found: dict) -> None:
    """Draw the loss by position of all models."""
    figure = new_figure(9, 4)
    axis = figure.subplots()
    for model, color in MODELS.items():
        by_position = losses(found, model)
        axis.plot(list(by_position), list(by_position.values()), color=color, label=model, linewidth=1.8)
    for length in (1024, 8192):
        axis.axvline(length, color="#d1d5db", linewidth=1, linestyle="--")
    axis.set(xlabel="position in bytes", ylabel="loss (nats per byte)")
    axis.grid(True, color="#e5e7eb", linewidth=0.6)
    axis.legend(frameon=False)
    save(figure, "drope-yarn-loss.svg")


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, name: str) -> None:
    """Write an SVG that does not change when it is drawn again."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(PAGE / name, metadata={"Date": None})


def draw() -> None:
    """Draw the plots, if there is a result file."""
    if (found := result()) is not None:
        plot_retrieval(found)
        plot_loss(found)
