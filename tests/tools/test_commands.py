"""The commands as a user types them."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

TINY = "examples/configs/pretrain_hybrid_tiny.yaml"


def command(root, *arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=280,
    )


def test_dry_run_prints_the_resolved_run(root, tmp_path):
    overrides = ("train.steps=77", f"run_dir={tmp_path}")  # runs/tiny may have more steps: README's first command trains it
    done = command(root, "tools/pretrain.py", TINY, *overrides, "--dry-run", "--world-size", "4")
    assert done.returncode == 0, done.stderr
    assert "steps: 77" in done.stdout and "1,984,720" in done.stdout.replace("_", ",")


@pytest.mark.parametrize(
    ("override", "field", "remedy"),
    [
        ("parallel.pipeline_parallel_size=3", "parallel.pipeline_parallel_size", "set it to 2"),
        ("train.optimzer.lr=1", "train.optimzer", "optimizer"),
        ("model.hidden_size=-1", "model.hidden_size", "1"),
    ],
)
def test_a_wrong_config_ends_with_78_before_torch_is_imported(root, override, field, remedy):
    done = command(root, "tools/pretrain.py", TINY, override, WORLD_SIZE="4", RANK="0", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 78
    assert field in done.stderr and remedy in done.stderr and "Traceback" not in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "megatron_hybrid.config.load" in imported and "torch" not in imported


def test_data_that_is_not_there_ends_with_78(root, tmp_path):
    done = command(root, "tools/pretrain.py", TINY, "data.train.0.path=/nowhere/x", f"run_dir={tmp_path}",
                   "parallel={}")  # fmt: skip
    assert done.returncode == 78, done.stderr
    assert "/nowhere/x" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_train_generate_evaluate(root, tmp_path):
    tokens = np.frombuffer(b"the cat sat on the mat. " * 3000, dtype=np.uint8).astype("uint16")
    tokens.tofile(tmp_path / "t.npy")
    data = f"{tmp_path}/t.npy"
    overrides = [
        f"data.train.0.path={data}", f"data.validation=[{{path: {data}}}]", f"run_dir={tmp_path}/run", "data.sequence_length=64",
        "model={base_preset: olmo_hybrid_tiny, layer_pattern: GA}", "parallel={}", "train.steps=40", "train.global_batch_size=4",
        "train.micro_batch_size=4", "tasks.paths=[]",
    ]  # fmt: skip
    done = command(root, "tools/pretrain.py", TINY, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]

    done = command(
        root, "tools/generate.py", f"{tmp_path}/run", "--prompt", "the cat ", "--max-tokens", "15", "--temperature", "0"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "the cat sat on the mat."

    done = command(root, "tools/evaluate.py", f"{tmp_path}/run/checkpoints/step-00000040", data, "--json")
    result = json.loads(done.stdout)
    assert result["step"] == 40 and result["loss"] < 0.5
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    with open(tmp_path / "run" / "metrics.jsonl") as f:
        assert json.loads(f.readlines()[-1])["eval_loss"] == pytest.approx(result["loss"], abs=0.05)
