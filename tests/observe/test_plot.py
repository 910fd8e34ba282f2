"""loss.png: smoothing, thinning, scales and a picture that can be opened."""

import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from megatron_hybrid.observe.plot import Curve, draw, smooth, thin


def records(count, top=5.5, bottom=2.2, every=None):
    rng = random.Random(0)
    for step in range(1, count + 1):
        loss = bottom + (top - bottom) * math.exp(-5 * step / count) + rng.gauss(0, 0.1)
        record = {"step": step, "loss": loss, "lr": 3e-4 * min(step / 20, 1), "tokens": step * 8192, "skipped": False}
        if every and step % every == 0:
            record |= {"eval_loss": loss + 0.1, "eval/my_eval_set/loss": loss + 0.2, "eval/my_eval_set/perplexity": 9}
        yield record


def curve_of(items):
    curve = Curve()
    for item in items:
        curve.add(item)
    return curve


def test_smooth_is_a_two_sided_mean():
    assert smooth([3.0] * 5, 10) == pytest.approx([3.0] * 5)
    rng = np.random.default_rng(0)
    values = rng.random(40)
    values[[0, 7, 8]] = np.nan
    weights = np.exp(-np.abs(np.subtract.outer(np.arange(40), np.arange(40))) / 3) * np.isfinite(values)
    assert smooth(list(values), 3) == pytest.approx(weights @ np.nan_to_num(values) / weights.sum(1))
    assert all(map(math.isnan, smooth([math.nan] * 3, 2))) and smooth([], 2) == []


def test_smooth_does_not_trail():
    falling = [10 - 0.01 * step for step in range(1000)]
    assert smooth(falling, 20)[200:800] == pytest.approx(falling[200:800], abs=1e-3)


def test_thin_is_the_mean_over_bins():
    columns = [list(range(10)), [float(i) for i in range(9)] + [math.nan]]
    assert thin(columns, most=5) == [[0.5, 2.5, 4.5, 6.5, 8.5], [0.5, 2.5, 4.5, 6.5, 8.0]]
    assert thin(columns[:1], most=100) == [columns[0]]
    assert all(len(column) <= 7 for column in thin(columns, most=7))


@pytest.mark.parametrize("scale, top", [("linear", 5.5), ("log", 14.0)])
def test_draw(tmp_path, monkeypatch, scale, top):
    axes = []
    from matplotlib.figure import Figure

    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (axes.extend(self.axes), save(self, *a, **k))[1])
    items = [*records(500, top=top, every=100), {"step": 501, "loss": None, "skipped": True}]
    items[300]["loss"] = 1e6  # a spike must not flatten the rest
    image = tmp_path / "new" / "loss.png"
    draw(curve_of(items), image, title="tiny")
    picture = np.asarray(Image.open(image).convert("RGB"))
    assert picture.shape[0] > 400 and picture.shape[1] > 800 and picture.std() > 5
    assert not list(image.parent.glob("*.tmp"))
    loss_axis = axes[0]
    assert loss_axis.get_yscale() == scale
    assert loss_axis.get_ylim()[1] < 1.5 * top
    labels = [text.get_text() for text in loss_axis.get_legend().get_texts()]
    sets = ["evaluation loss", "evaluation loss of my_eval_set"]
    assert labels == ["training loss", "learning rate", *sets, "1 skipped"]
    assert loss_axis.get_xlabel() == "step (4.1 M tokens)"


def test_tasks_have_an_axis_of_their_own(tmp_path):
    results = {"eval/mmlu/acc": 0.25, "eval/mmlu/acc_norm": 0.3, "eval/bpb/bits_per_byte": 0.9, "eval/bpb/documents": 8}
    items = [
        {"step": 1, "loss": 2.0, "lr": 1e-3, "tokens": 5},
        {"step": 1, "eval/code/loss": 3.0, "eval/code/tokens": 4} | results,
    ]
    items.append({"step": 2, "eval/mmlu/acc": None, "eval/mmlu/acc_norm": None})
    curve = curve_of(items)
    tasks = {name: (list(steps), list(values)) for name, (steps, values) in curve.tasks.items()}
    assert tasks == {"mmlu acc": ([1], [0.25]), "bpb bits_per_byte": ([1], [0.9])}
    assert list(curve.evaluations) == ["code"]
    draw(curve, tmp_path / "loss.png")
    draw(curve_of(items[:1]), tmp_path / "without.png")
    heights = [Image.open(tmp_path / name).height for name in ("loss.png", "without.png")]
    assert heights[0] > heights[1]


def test_curves_with_little_to_show(tmp_path):
    skipped = {"step": 1, "loss": None, "skipped": True}
    for items in ([], [{"step": 1, "loss": 2.0}], [skipped], [{"step": 0, "eval_loss": 3.0}]):
        draw(curve_of(items), tmp_path / "loss.png")


def test_from_a_file(tmp_path):
    lines = [json.dumps(record) for record in records(50, every=25)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 51, "lo')
    curve = Curve.read(tmp_path / "metrics.jsonl")
    assert len(curve.steps) == 50 and list(curve.evaluations[""][0]) == [25, 50] and curve.tokens == 50 * 8192
    draw(curve, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
