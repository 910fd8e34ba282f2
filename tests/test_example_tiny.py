"""The README's first command, cut short: set-up, data, four ranks at TP2 x PP2 under torchrun with preflight, a checkpoint."""

import json
import subprocess

import pytest


@pytest.mark.slow
def test_the_tiny_example_trains_and_goes_on(root, tmp_path):
    run = tmp_path / "run"

    def train(steps: int, *more: str) -> str:
        overrides = [f"train.steps={steps}", "train.schedule.warmup_steps=1", "train.eval_interval=2", f"run_dir={run}"]
        command = ["bash", "examples/pretrain_hybrid_tiny.sh", *overrides, "checkpoint.interval=2", *more]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    assert "preflight: 1 node, 4 ranks" in train(2)
    assert "resumed from" in train(4, "preflight.enabled=false", "train.eval_interval=null")
    with open(run / "metrics.jsonl") as f:
        lines = [json.loads(line) for line in f]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["loss"] < lines[0]["loss"]
