"""Stages that are killed at any point end with the same weights when the same command runs again."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from megatron_hybrid.checkpoint.reader import CheckpointReader
from tests.train.test_trainer import make_config

STAGES = [
    {"name": "first", "config": "run.yaml"},
    {"name": "second", "config": "run.yaml", "overrides": ["data.seed=1"], "from": "first", "take": "moments"},
    {"name": "last", "config": "long.yaml", "from": "average(first, second)", "take": "moments"},
]
KILLS = int(os.environ.get("STAGES_KILLS", "1"))


def start(root, file, folder) -> subprocess.Popen:
    command = [sys.executable, "tools/run_stages.py", str(file), "--cpu-ranks", "1", "--folder", str(folder)]
    return subprocess.Popen(
        command, cwd=root, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointReader(folder / "last" / "checkpoints" / "step-00000040") as reader:
        return {name: reader.read(name) for name in reader.index.tensors}


@pytest.mark.slow
def test_it_ends_with_the_same_weights(root, tmp_path):
    """Set STAGES_KILLS for more kills than one."""
    config = make_config(tmp_path)
    config["train"] |= {"steps": 40, "eval_interval": None, "batch_ramp": None}
    config["checkpoint"] = {"interval": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "long.yaml").write_text("extends: run.yaml\nmodel: {rope_theta: null}\ndata: {sequence_length: 32}")
    file = tmp_path / "stages.yaml"
    file.write_text(yaml.safe_dump({"folder": "unused", "stages": STAGES}))

    begin = time.monotonic()
    assert start(root, file, tmp_path / "straight").wait(280) == 0
    length = time.monotonic() - begin
    assert (tmp_path / "straight" / "loss.png").stat().st_size > 10_000

    dice = random.Random(KILLS)
    for _ in range(KILLS):
        process = start(root, file, tmp_path / "killed")
        time.sleep(dice.uniform(0.2, 0.9) * length)
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the launcher and all ranks
        process.wait()
    process = start(root, file, tmp_path / "killed")
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors.decode()[-3000:]
    expected, found = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
