"""examples/pretrain_hybrid_7b.sh: what it would submit, without a cluster (tests/slurm has one), and its defaults."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.config.load import load_run

SCRIPT = "examples/pretrain_hybrid_7b.sh"
CONFIG = "examples/configs/pretrain_hybrid_7b.yaml"


@pytest.fixture
def login_node(root, tmp_path):
    """`login_node(*overrides, **variables)`: the script, where sbatch says what it was given and 64 nodes are up.

    Data for one sample are there, unless the variables say otherwise.
    """
    data = tmp_path / "tokens.npy"
    np.zeros(9000, np.uint32).tofile(data)
    there = {"DATA": str(data), "VALIDATION": str(data), "RUN_DIR": str(tmp_path / "run")}
    commands = {"sbatch": 'echo "sbatch $*"', "sinfo": 'for i in $(seq 64); do echo "node$i"; echo "node$i"; done'}
    for name, body in commands.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(*overrides: str, **variables: str) -> subprocess.CompletedProcess:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        # HYBRID_EXTRAS: nothing is to be installed for this
        env = kept | {"PATH": f"{tmp_path}:{kept['PATH']}", "HYBRID_EXTRAS": "dev"} | there | variables
        command = ["bash", SCRIPT, *overrides]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize(("nodes", "microbatches"), [(8, 8), (16, 4), (64, 1)])
def test_the_recipe_on_8_16_and_64_nodes(root, nodes, microbatches):
    run = load_run(str(Path(root) / CONFIG))
    run.check_world(nodes * 8)
    assert run.train.global_batch_size * run.data.sequence_length == 4 * 2**20, "AI2's tokens a step"
    ranks = run.parallel.data_parallel_size(nodes * 8)
    assert run.train.global_batch_size == ranks * run.train.micro_batch_size * microbatches


@pytest.mark.parametrize("nodes", ["8", "16", "64"])
def test_what_is_submitted(login_node, nodes):
    done = login_node("train.optimizer.lr=1e-4", NODES=nodes)
    assert done.returncode == 0, done.stderr
    wanted = f"sbatch --nodes={nodes} --gpus-per-node=8 --exclusive --mem=0 {SCRIPT} train.optimizer.lr=1e-4"
    assert done.stdout.strip() == wanted


def test_eight_nodes_unless_told_otherwise(login_node):
    assert "sbatch --nodes=8 --gpus-per-node=4 " in login_node(GPUS_PER_NODE="4", TP="1").stdout
    assert "sbatch --nodes=8 examples/" in login_node(CPU_RANKS="2").stdout, "no GPUs for ranks on CPU"


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"TP": "31"}, "parallel.tensor_parallel_size"),
        ({"CP": "16"}, "parallel.context_parallel_size: 16 exceeds the 15 key/value heads"),
        ({"NODES": "7"}, "train.global_batch_size"),
        ({"PP": "33"}, "parallel.pipeline_parallel_size"),
        ({"PRECISION": "fp4"}, "precision.fp8_recipe: 'fp4' is not one of"),
        ({"PRECISION": "bf61"}, "precision.fp8_recipe"),
        ({"DATA": "tokens.bin"}, "data.train.0.path"),
        ({"DATA": "/no/such/*.npy"}, "data.train.0.path: /no/such/*.npy: no such file"),
        ({"VALIDATION": "/no/such.npy"}, "data.validation.0.path: /no/such.npy: no such file"),
        ({"RUN_DIR": "/dev/null/run"}, "run_dir: /dev/null/run cannot be made or written: /dev/null is a file"),
    ],
)
def test_what_is_wrong_is_not_submitted(login_node, variables, says):
    done = login_node(**variables)
    assert done.returncode == 78 and says in done.stderr and "sbatch" not in done.stdout, done.stderr


def test_files_that_only_the_compute_nodes_see(login_node):
    done = login_node(DATA="/no/such/*.npy", FILES="skip")
    assert done.returncode == 0 and "sbatch --nodes=8" in done.stdout, done.stderr


def test_more_nodes_than_there_are(login_node):
    done = login_node(NODES="128", TP="4")
    assert done.returncode == 69 and "64 nodes are up and NODES=128" in done.stderr and "sbatch" not in done.stdout
