"""loss.png of a list of stages: the training loss of every stage over the tokens since the first one began."""

from collections.abc import Sequence
from pathlib import Path

from megatron_hybrid.observe.metrics import read_metrics
from megatron_hybrid.observe.stages_plot import StageCurve, draw_stages
from megatron_hybrid.stages.plan import Training, Work


def plot_stages(work: Sequence[Work], image: Path) -> None:
    """Draw the stages that have metrics. Stages that start from the same checkpoint begin at the same place."""
    ends: dict[str, float] = {}
    curves = []
    for item in work:
        begin = max((ends.get(name, 0.0) for name in item.needs), default=0.0)
        ends[item.name] = begin
        if not isinstance(item, Training):
            continue
        path = Path(item.run().run_dir) / "metrics.jsonl"
        records = [r for r in read_metrics(path) if r.get("loss") is not None] if path.is_file() else []
        if records:
            curve = StageCurve(item.name, [begin + r["tokens"] for r in records], [r["loss"] for r in records])
            curves.append(curve)
            ends[item.name] = curve.tokens[-1]
    if curves:
        draw_stages(curves, image)
