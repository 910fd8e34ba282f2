"""A tiny list of stages that is killed at random points and started again, against the same stages undisturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron_hybrid.checkpoint.reader import CheckpointReader
from testing.models import SMALLEST

STEPS = 40
STAGES: list[dict[str, Any]] = [
    {"name": "first", "config": "run.yaml"},
    {"name": "second", "config": "run.yaml", "overrides": ["data.seed=1"], "from": "first", "take": "moments"},
    {"name": "last", "config": "long.yaml", "from": "average(first, second)", "take": "moments"},
]


def write_stages(folder: Path, stages: list[dict[str, Any]]) -> Path:
    """Write tokens, configurations and the file of stages, and return the last."""
    tokens = np.cumsum(np.random.default_rng(0).integers(0, 3, 20_000)) % SMALLEST["vocab_size"]
    tokens.astype("uint16").tofile(folder / "tokens.npy")
    run = dict(
        run_dir="unused",
        model=SMALLEST,
        data=dict(train=[{"path": str(folder / "tokens.npy")}], sequence_length=16),
        train=dict(steps=STEPS, global_batch_size=8, micro_batch_size=4, dtype="fp32", schedule=dict(warmup_steps=2)),
        checkpoint=dict(interval=2),
        logging=dict(plot_interval=0, tensorboard=False),
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "long.yaml").write_text("extends: run.yaml\nmodel: {rope_theta: null}\ndata: {sequence_length: 32}")
    file = folder / "stages.yaml"
    file.write_text(yaml.safe_dump({"folder": "unused", "stages": stages}))
    return file


def start(root: Path, file: Path, folder: Path) -> subprocess.Popen[str]:
    """Start the stages in a session of their own."""
    command = [sys.executable, "tools/run_stages.py", str(file), "--cpu-ranks", "1", "--folder", str(folder)]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=root, start_new_session=True, **pipes)  # type: ignore[call-overload]


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for the stages.

    Raises:
        RuntimeError: they failed.
    """
    _, errors = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(f"status {process.returncode}: {errors[-3000:]}")


def last_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return weights and moments of the last stage."""
    with CheckpointReader(folder / "last" / "checkpoints" / f"step-{STEPS:08d}") as reader:
        return {name: reader.read(name) for name in reader.index.tensors}


def values_that_differ(
    root: Path, folder: Path, kills: int, seed: int = 0, stages: list[dict[str, Any]] = STAGES
) -> int:
    """Run the stages undisturbed and killed `kills` times, and return the number of final values that differ."""
    file, dice, began = write_stages(folder, stages), random.Random(seed), time.monotonic()
    finish(start(root, file, folder / "straight"))
    length = time.monotonic() - began
    for _ in range(kills):
        process = start(root, file, folder / "killed")
        time.sleep(dice.uniform(0.15, 0.8) * length)
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and all ranks
        process.communicate()
    finish(start(root, file, folder / "killed"))
    expected, found = last_tensors(folder / "straight"), last_tensors(folder / "killed")
    if expected.keys() != found.keys():
        return -1
    return sum(int((value != found[name]).sum()) for name, value in expected.items())
