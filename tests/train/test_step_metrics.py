"""Metrics of every step: losses and tokens of sources, shares of masked tokens, spikes."""

import math
import random
import statistics

import pytest

from megatron_hybrid.data.source_names import short_names
from megatron_hybrid.train.spike_score import SpikeScore
from testing import jobs
from tests.data.files import write_raw
from tests.train.test_trainer import config, metrics  # noqa: F401 - config is a fixture


def test_losses_of_sources_and_masked_tokens(ranks, config, tmp_path):  # noqa: F811
    (tmp_path / "repeating").mkdir()
    rng = random.Random(0)
    repeated = [5] * 80 + [rng.randrange(97) for _ in range(320)]  # 5 of 25 samples repeat a token 16 times
    write_raw(tmp_path / "repeating" / "tokens.npy", [*repeated, 1])
    plain = config["data"]["train"][0]
    sources = [plain | {"weight": 3.0}, {"path": str(tmp_path / "repeating" / "tokens.npy")}]
    rule = dict(repetition_min_period=1, repetition_max_period=2, repetition_max_count=16)
    config["data"] |= {"train": sources, "instance_filter": rule}
    config["train"] |= {"steps": 13, "batch_ramp": None, "eval_interval": None, "global_batch_size": 8}
    ranks.run(jobs.pretrain_run, 2, config=config)
    lines = metrics(config)
    names = sorted(key for key in lines[-1] if key.startswith("source/") and key.endswith("/tokens"))
    assert names == ["source/repeating/tokens.npy/tokens", "source/tokens.npy/tokens"]
    tokens = [[line[name] for name in names] for line in lines]
    assert tokens[-1] == [13 * 2 * 16, 13 * 6 * 16], "a quarter of the samples, three quarters"
    assert sum(line["filtered_samples"] for line in lines) in (5, 6)  # 26 samples: an epoch of 25 with 5, and one more
    for line in lines:
        counted = 128 - 16 * line["filtered_samples"]
        assert line["counted_share"] == counted / 128 and line["filtered_share"] == 1 - counted / 128
        of_second = 32 - 16 * line["filtered_samples"]
        losses = [line.get(name.removesuffix("/tokens") + "/loss", 0.0) for name in names]
        assert line["loss"] == pytest.approx((losses[0] * of_second + losses[1] * 96) / counted, rel=1e-6)


def test_short_names():
    assert short_names(["data/web/*.npy", "data/code/*.npy"]) == ["web", "code"]
    assert short_names(["data/web", "data/code/train"]) == ["web", "code/train"]
    assert short_names(["/a/one.npy", "/a/two.npy"]) == ["one.npy", "two.npy"]
    assert short_names(["x", "x", "x-2", "y"]) == ["x", "x-2", "x-2-2", "y"]
    assert short_names(["data/web"]) == ["web"]


def spikes(values: list[float]) -> int:
    """The definition, by a loop: more than 6 standard deviations off the mean of the last 128 finite values."""
    found = 0
    for i, value in enumerate(values):
        window = [v for v in values[:i] if math.isfinite(v)][-128:]
        judged = len(window) >= 64 and math.isfinite(value)
        found += not math.isfinite(value) or (
            judged and abs(value - statistics.fmean(window)) > 6 * statistics.stdev(window)
        )
    return found


def test_spike_score():
    rng = random.Random(0)
    values = [rng.gauss(2.0, 0.1) for _ in range(400)]
    for place, spike in ((70, 3.0), (71, 2.95), (150, 0.5), (300, math.nan), (301, math.inf), (390, 4.0)):
        values[place] = spike
    score, saved, shares = SpikeScore(), None, []
    for step, value in enumerate(values):
        if step == 200:
            saved, score = score.state_dict(), SpikeScore()
            score.load_state_dict(saved)
        shares.append(score.add({"loss": value, "grad_norm": 1.0}))
    assert shares[-1] == spikes(values) / 400 and spikes(values) >= 5
    assert shares[60] == 0
