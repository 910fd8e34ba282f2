"""Plot of the training loss of several runs that continue each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_hybrid.observe.plot import save, smooth, thin

COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2")


@dataclass(frozen=True)
class StageCurve:
    """Losses of one run by the tokens since the first run began."""

    name: str
    tokens: Sequence[float]
    losses: Sequence[float]


def draw_stages(curves: Sequence[StageCurve], image: Path) -> None:
    """Write the curves as a PNG, raw values behind smoothed ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for number, curve in enumerate(curves):
        tokens, losses = thin([curve.tokens, curve.losses])
        color = COLORS[number % len(COLORS)]
        axis.plot(tokens, losses, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(tokens, smooth(losses, max(len(losses) / 50, 1)), color=color, linewidth=1.8, label=curve.name)
    axis.set_xlabel("tokens")
    axis.set_ylabel("training loss (nats per token)")
    axis.grid(True, color="#e5e7eb", linewidth=0.6)
    axis.legend(frameon=True, framealpha=0.9, edgecolor="none")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    save(figure, image)
