"""loss.png: training loss (raw and smoothed), loss of each validation set, skipped updates, learning rate, and downstream tasks."""

import math
from array import array
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Self

from megatron_hybrid.observe.keys import evaluation_losses, task_results
from megatron_hybrid.observe.metrics import read_metrics

BLUE, ORANGE, GREY, RED = "#2563eb", "#ea580c", "#9ca3af", "#dc2626"
SET_COLORS = (ORANGE, "#16a34a", "#9333ea", "#0891b2", "#ca8a04", "#be185d", "#4d7c0f", "#111827")
"""Colors of validation sets, and of tasks."""
MOST_POINTS = 4000
"""Largest number of plotted points. Longer curves are drawn as means over bins."""


class Curve:
    """Plotted values by step. The curve grows with the run, so that drawing does not read metrics.jsonl again."""

    def __init__(self) -> None:
        self.steps, self.losses, self.rates = array("d"), array("d"), array("d")
        self.evaluations: dict[str, tuple[array[float], array[float]]] = {}
        """Steps and losses by the name of the validation set."""
        self.tasks: dict[str, tuple[array[float], array[float]]] = {}
        """Steps and results by the name of the task and its metric."""
        self.skipped = array("d")
        self.tokens = 0

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read the curve of a metrics.jsonl."""
        curve = cls()
        for record in read_metrics(path):
            curve.add(record)
        return curve

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record. Values that are missing or not finite leave a gap."""
        if record.get("loss") is not None or record.get("lr") is not None:
            self.steps.append(record["step"])
            self.losses.append(_number(record.get("loss")))
            self.rates.append(_number(record.get("lr")))
            self.tokens = record.get("tokens") or self.tokens
        if record.get("skipped"):
            self.skipped.append(record["step"])
        for curves, found in ((self.evaluations, evaluation_losses(record)), (self.tasks, task_results(record))):
            for name, value in found.items():
                steps, values = curves.setdefault(name, (array("d"), array("d")))
                steps.append(record["step"])
                values.append(value)


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Return the mean with weights exp(-distance / span) on both sides, which does not lag behind a falling curve.

    NaNs are skipped; a gap gets the mean of its surroundings.
    """
    before, after = _decaying_sums(values, span), _decaying_sums(values[::-1], span)[::-1]
    result = []
    for value, (sum_before, weight_before), (sum_after, weight_after) in zip(values, before, after):
        own = math.isfinite(value)  # counted on both sides
        weight = weight_before + weight_after - own
        result.append((sum_before + sum_after - (value if own else 0)) / weight if weight > 0 else math.nan)
    return result


def _decaying_sums(values: Sequence[float], span: float) -> list[tuple[float, float]]:
    """Return, for each value, the sums of the finite values up to it and of their weights, which decay with distance."""
    keep, total, weight, result = math.exp(-1 / span), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total, keep * weight
        if math.isfinite(value):
            total, weight = total + value, weight + 1
        result.append((total, weight))
    return result


def thin(columns: Sequence[Sequence[float]], most: int = MOST_POINTS) -> list[list[float]]:
    """Return columns of equal length as means over at most `most` bins of rows. NaNs are skipped."""
    size = math.ceil(len(columns[0]) / most) or 1
    return [[_mean(column[i : i + size]) for i in range(0, len(column), size)] for column in columns]


def draw(curve: Curve, image: Path | str, title: str | None = None) -> None:
    """Write a curve as a PNG. The image is written to a temporary file first, so that viewers never see half an image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps figures alive and picks a backend for the whole process.
    figure = Figure(figsize=(9, 6.5 if curve.tasks else 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [3, 1] if curve.tasks else [1]
    axis, *below = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _draw_losses(axis, curve)
    for task_axis in below:
        _draw_tasks(task_axis, curve)
    last = below[-1] if below else axis
    last.set_xlabel(f"step ({_count(curve.tokens)} tokens)" if curve.tokens else "step")
    if title:
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    save(figure, Path(image))


def _draw_losses(axis: Any, curve: Curve) -> None:
    rate_axis = axis.twinx()
    axis.set_zorder(rate_axis.get_zorder() + 1)  # draw the loss in front of the learning rate
    axis.patch.set_visible(False)
    steps, losses, rates = thin([curve.steps, curve.losses, curve.rates])
    smoothed = smooth(losses, max(len(losses) / 100, 1))
    handles = rate_axis.plot(steps, rates, color=GREY, linewidth=1.2, linestyle="--", label="learning rate")
    axis.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    handles = axis.plot(steps, smoothed, color=BLUE, linewidth=1.8, label="training loss") + handles
    names = {name: f"evaluation loss{f' of {name}' if name else ''}" for name in curve.evaluations}
    handles += _draw_points(axis, curve.evaluations, names)
    _scale(axis, [*losses, *(loss for _, of_set in curve.evaluations.values() for loss in of_set)])
    if curve.skipped:
        bottom = axis.get_xaxis_transform()  # y in shares of the height
        style = {"color": RED, "marker": "|", "markersize": 9, "linestyle": "none", "clip_on": False}
        handles += axis.plot(
            curve.skipped, [0.0] * len(curve.skipped), transform=bottom, label=f"{len(curve.skipped)} skipped", **style
        )
    axis.set_ylabel("loss (nats per token)")
    rate_axis.set_ylabel("learning rate", color=GREY)
    rate_axis.tick_params(axis="y", colors=GREY)
    rate_axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate_axis.set_ylim(bottom=0)
    _finish(axis, handles)
    for spine in ("top", "left", "right", "bottom"):
        rate_axis.spines[spine].set_visible(False)


def _draw_tasks(axis: Any, curve: Curve) -> None:
    handles = _draw_points(axis, curve.tasks, {name: name for name in curve.tasks})
    if all(0 <= value <= 1 for _, values in curve.tasks.values() for value in values):
        axis.set_ylim(0, 1)
    axis.set_ylabel("tasks")
    _finish(axis, handles)


def _draw_points(
    axis: Any, curves: Mapping[str, tuple[array[float], array[float]]], names: Mapping[str, str]
) -> list[Any]:
    """Draw curves with few points. Returns their legend entries."""
    style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2}
    handles: list[Any] = []
    for (name, (steps, values)), color in zip(curves.items(), cycle(SET_COLORS)):
        handles += axis.plot(steps, values, label=names[name], color=color, **style)
    return handles


def _finish(axis: Any, handles: Sequence[Any]) -> None:
    axis.grid(True, which="both", color="#e5e7eb", linewidth=0.6)
    for spine in ("top", "right"):
        axis.spines[spine].set_visible(False)
    axis.legend(handles=handles, loc="upper right", frameon=True, framealpha=0.9, edgecolor="none")


def save(figure: Any, image: Path) -> None:
    """Write a figure as a PNG, under its name only when it is complete."""
    image.parent.mkdir(parents=True, exist_ok=True)
    temporary = image.with_name(image.name + ".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(image)


def _scale(axis: Any, points: Sequence[float]) -> None:
    """Set the scale and limits of the loss axis: logarithmic if losses span more than a factor of five, robust against few spikes."""
    finite = [v for v in points if math.isfinite(v)]
    if not finite:
        return
    ranked = sorted(finite)
    low, high = ranked[0], max(finite[0], ranked[int(0.995 * (len(ranked) - 1))])
    if low > 0 and high / low > 5:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(low / 1.05, high * 1.08)
    else:
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        axis.set_ylim(low - margin, high + margin)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _count(number: float) -> str:
    """Format a count: 1234567 gives `1.23 M`."""
    for limit, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:g}"
