"""Plot of the best layouts: memory and step time by part."""

from pathlib import Path
from typing import Any

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.planner.report import heading
from megatron_hybrid.planner.search import SearchResult

COLORS = (
    "#2563eb",
    "#ea580c",
    "#16a34a",
    "#9333ea",
    "#dc2626",
    "#0891b2",
    "#ca8a04",
    "#9ca3af",
    "#be185d",
    "#4d7c0f",
    "#1e3a8a",
)


def check_format(image: Path) -> None:
    """Check the format that an image's name ends in.

    Raises:
        ConfigError: matplotlib cannot write it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if image.suffix.removeprefix(".").lower() not in formats:
        raise ConfigError.at(
            "plot", f"{image} does not end in an image format; end it in .png, or one of {', '.join(formats)}"
        )


def draw(found: SearchResult, image: Path | str, top: int = 6) -> None:
    """Draw the best `top` candidates as stacked bars, memory above and time below, in the format that `image` ends in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = found.candidates[:top]
    figure = Figure(figsize=(11, 2.4 + 0.9 * len(best)), layout="constrained")
    FigureCanvasAgg(figure)
    memory, time = figure.subplots(2, 1)
    labels = [c.plan.label for c in best]
    outside = "reserve, fragmentation"
    bytes_ = [{**c.memory.parts(), outside: c.need - c.memory.total} for c in best]
    _bars(memory, labels, [{name: size / 1e9 for name, size in parts.items()} for parts in bytes_], "GB per GPU")
    memory.axvline(found.job.hardware.memory_bytes / 1e9, color="#111827", linestyle="--", linewidth=1)
    _bars(time, labels, [dict(c.step.parts) for c in best], "seconds per step")
    figure.suptitle(heading(found.job), fontsize=10)
    figure.savefig(image, dpi=140)


def _bars(axes: Any, labels: list[str], rows: list[dict[str, float]], unit: str) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    left = [0.0] * len(rows)
    for name, color in zip(names, COLORS * 2):
        values = [row.get(name, 0.0) for row in rows]
        axes.barh(labels, values, left=left, color=color, label=name, height=0.7)
        left = [a + b for a, b in zip(left, values)]
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
