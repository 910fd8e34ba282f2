"""One small run, TP2, under every launcher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from testing.models import SMALLEST

MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]


def write_run(folder: Path, steps: int) -> Path:
    """Tokens and a run's configuration in `folder`; the configuration's path."""
    (np.arange(5000) * 7 % 97).astype("uint16").tofile(folder / "tokens.npy")
    config = dict(
        run_dir="?",
        model=SMALLEST,
        data=dict(train=[{"path": str(folder / "tokens.npy")}], sequence_length=16),
        train=dict(steps=steps, global_batch_size=4, micro_batch_size=1, dtype="fp32"),
        parallel=dict(tensor_parallel_size=2),
        logging=dict(plot_interval=0, tensorboard=False),
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def launchers(folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name -> command in front of the script, and variables that it needs."""
    (folder / "hidden" / "mpi4py").mkdir(parents=True)
    (folder / "hidden" / "mpi4py" / "__init__.py").write_text("raise ImportError('hidden by a test')")
    hidden = os.pathsep.join([str(folder / "hidden"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {
        "torchrun": ([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], {}),
        "tools/launch.py": ([sys.executable, "tools/launch.py", "--cpu-ranks", "2"], {}),
        "mpirun, mpi4py": ([*MPIRUN, sys.executable], {}),
        "mpirun, its variables": ([*MPIRUN, sys.executable], {"PYTHONPATH": hidden}),
    }


def curve(command: list[str], variables: dict[str, str], root: Path, config: Path, run: Path) -> list[tuple]:
    """(step, loss, gradient norm) of a run started so from the project's folder `root`."""
    done = subprocess.run(
        [*command, "tools/pretrain.py", str(config), f"run_dir={run}"],
        cwd=root,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]
