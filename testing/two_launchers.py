"""One small run through tools/launch.py: by one launcher on one rank, and by two launchers, each of which is a node with one rank.

With GPUs, both ranks are on the first one (testing/shared_gpu.py).
"""

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from megatron_hybrid.launch.environment import free_port
from testing import gpu_jobs, shared_gpu

STEPS, TIMEOUT_S = 10, 300
LAYOUTS = {"TP2": ["parallel.tensor_parallel_size=2"], "PP2": ["parallel.pipeline_parallel_size=2"], "DP2": []}
"""Overrides by layout."""


def write_run(folder: Path, steps: int) -> Path:
    """Write tokens and a run's configuration, and return the configuration's path."""
    tokens = np.cumsum(np.random.default_rng(0).integers(0, 3, 100_000)) % gpu_jobs.MODEL["vocab_size"]
    tokens.astype("uint16").tofile(folder / "tokens.npy")
    config = dict(
        run_dir="?",
        model=gpu_jobs.MODEL | gpu_jobs.WIDE["model"],
        data=dict(train=[{"path": str(folder / "tokens.npy")}], sequence_length=256),
        train=gpu_jobs.training("fp32") | dict(steps=steps, optimizer=dict(eps=1e-2, lr=1e-2)),
        logging=dict(interval=1, plot_interval=0, tensorboard=False),
        preflight=dict(enabled=True, all_reduce_mib=16),
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def curve(config: Path, run: Path, launchers: list[dict[str, str]], *overrides: str, cpu: bool = False) -> dict:
    """Return the losses and gradient norms ("norms") of a run, from all launchers together.

    Args:
        launchers: variables of each.
        cpu: start a rank on CPU per launcher, not one per GPU.

    Raises:
        RuntimeError: a launcher failed.
    """
    command = [sys.executable, "tools/launch.py", *(["--cpu-ranks", "1"] if cpu else ["--gpus", "1"])]
    command += ["tools/pretrain.py", str(config), f"run_dir={run}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        environments = [os.environ | own for own in launchers]
        status, said = shared_gpu.run_together(command, environments, Path(folder), TIMEOUT_S)
    if status:
        raise RuntimeError(f"a launcher ended with status {status}:\n{said}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [line["loss"] for line in lines], "norms": [line["grad_norm"] for line in lines]}


def nodes(count: int) -> list[dict[str, str]]:
    """Return the variables of launchers that a job controller would start on that many nodes."""
    common = dict(NNODES=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return [common | {"NODE_RANK": str(node)} | shared_gpu.host(node) for node in range(count)]


def curves(
    folder: Path, steps: int, layouts: Sequence[str] = tuple(LAYOUTS), *, cpu: bool = False
) -> tuple[dict, dict[str, dict]]:
    """Return the curve of one rank, and those of two nodes by layout."""
    config, two = write_run(folder, steps), {}
    one = curve(config, folder / "one", [{}], cpu=cpu)
    with shared_gpu.service() as variables:
        for name in layouts:
            launchers = [variables | own for own in nodes(2)]
            two[name] = curve(config, folder / name, launchers, *LAYOUTS[name], cpu=cpu)
    return one, two
