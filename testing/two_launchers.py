"""One small run through tools/launch.py: by one launcher on one rank, and by two launchers, each of which is a node with one rank.

With GPUs, both ranks are on the first one (testing/shared_gpu.py).
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import yaml

from megatron_hybrid.launch.environment import free_port
from testing import gpu_jobs, shared_gpu

ROOT = Path(__file__).resolve().parent.parent
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
    with ExitStack() as stack:
        started = []
        for own in launchers:
            output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | own, **output))
            stack.callback(started[-1].kill)
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    for process, text in zip(started, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"a launcher ended with status {process.returncode}:\n{text[-3000:]}")
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
