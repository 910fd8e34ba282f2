"""examples/pretrain_hybrid_7b.sh: what it would submit, without a cluster (tests/slurm has one), and its defaults."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megatron_hybrid.config.load import load_run
from tests.data.files import write_indexed

SCRIPT = "examples/pretrain_hybrid_7b.sh"
CONFIG = "examples/configs/pretrain_hybrid_7b.yaml"


@pytest.fixture
def login_node(root, tmp_path):
    """`login_node(*overrides, **variables)`: the script, where sbatch says what it was given and 64 nodes are up.

    Data for one sample are there, unless the variables say otherwise.
    """
    (tmp_path / "caller").mkdir()
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
        env = kept | {"PATH": f"{tmp_path}:{kept['PATH']}"} | there | variables
        command = ["bash", root / SCRIPT, *overrides]
        return subprocess.run(command, cwd=tmp_path / "caller", env=env, capture_output=True, text=True, timeout=200)

    return run


@pytest.mark.parametrize(("nodes", "microbatches"), [(8, 8), (16, 4), (64, 1)])
def test_the_recipe_on_8_16_and_64_nodes(root, nodes, microbatches):
    run = load_run(str(Path(root) / CONFIG))
    run.check_world(nodes * 8)
    assert run.train.global_batch_size * run.data.sequence_length == 4 * 2**20, "AI2's tokens a step"
    ranks = run.parallel.data_parallel_size(nodes * 8)
    assert run.train.global_batch_size == ranks * run.train.micro_batch_size * microbatches


@pytest.mark.parametrize("nodes", ["8", "16", "64"])
def test_what_is_submitted(login_node, root, tmp_path, nodes):
    done = login_node("train.optimizer.lr=1e-4", NODES=nodes)
    assert done.returncode == 0, done.stderr
    command, _, rest = done.stdout.strip().partition(" --output=")
    assert command == f"sbatch --nodes={nodes} --gpus-per-node=8 --exclusive --mem=0"
    assert rest == f"{tmp_path}/caller/logs/%x-%j.log {root}/{SCRIPT} train.optimizer.lr=1e-4"


def test_datasets_of_preprocess_need_no_type(login_node, tmp_path):
    write_indexed(tmp_path / "corpus_train", [[5] * 9000])
    write_indexed(tmp_path / "corpus_validation", [[5] * 9000])
    data = {"DATA": str(tmp_path / "corpus_train"), "VALIDATION": str(tmp_path / "corpus_validation")}
    done = login_node(**data)
    assert done.returncode == 0 and done.stdout.startswith("sbatch "), done.stderr


def test_eight_nodes_unless_told_otherwise(login_node):
    assert "sbatch --nodes=8 --gpus-per-node=4 " in login_node(GPUS_PER_NODE="4", TP="1").stdout
    assert "sbatch --nodes=8 --output=" in login_node(CPU_RANKS="2").stdout, "no GPUs for ranks on CPU"


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"EXCLUSIVE": "no", "MEM": "200G"}, "--gpus-per-node=8 --mem=200G --output="),
        ({"CPU_RANKS": "2", "EXCLUSIVE": "yes"}, "--nodes=8 --exclusive --mem=0 --output="),
        (
            {"MEM": "900G", "DEPENDENCY": "afterok:12", "SBATCH_OUTPUT": "a"},
            "--exclusive --mem=900G --dependency=afterok:12 /",
        ),
    ],
)
def test_options_of_the_job(login_node, variables, wanted):
    done = login_node(**variables)
    assert done.returncode == 0 and wanted in done.stdout, done.stdout + done.stderr


def test_logs_of_an_array_have_names_of_their_own(login_node):
    assert (
        "--array=0-3 --output=" in (shown := login_node(ARRAY="0-3", RUN_DIR="runs/{task}").stdout)
        and "/logs/%x-%A_%a.log" in shown
    )


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ARRAY": "0-3"}, "the tasks would share a run folder; set RUN_DIR to a path with {task}"),
        ({"EXCLUSIVE": "true"}, "EXCLUSIVE=true: set it to yes for whole nodes, or no"),
        ({"MODULES": "cuda/13.0"}, "MODULES=cuda/13.0 is set, and this node has no module command"),
    ],
)
def test_wrong_variables_of_the_job(login_node, variables, says):
    done = login_node(**variables)
    assert done.returncode == 78 and says in done.stderr and "sbatch" not in done.stdout, done.stderr


def test_relative_paths_start_from_the_caller_s_folder(login_node, tmp_path):
    (tmp_path / "caller" / "tokens.npy").write_bytes((tmp_path / "tokens.npy").read_bytes())
    done = login_node(DATA="tokens.npy", VALIDATION="../tokens.npy", RUN_DIR="runs/a")
    assert done.returncode == 0, done.stderr
    done = login_node(DATA="examples/configs/tokens.npy")
    assert done.returncode == 78 and "examples/configs/tokens.npy: no such file" in done.stderr


def test_a_machine_without_gpus_is_told_so_before_anything_is_installed(root, tmp_path):
    for name in ("dirname", "bash", "grep", "tail", "realpath"):
        (tmp_path / name).symlink_to(shutil.which(name))
    environment = {"PATH": str(tmp_path), "HYBRID_PYTHON": "/no/python"}
    done = subprocess.run(["bash", root / SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 78 and done.stderr.count("\n") == 1
    assert "no GPU and no SLURM; set CPU_RANKS=4" in done.stderr


@pytest.fixture
def allocation(root, tmp_path):
    """`allocation(**variables)`: the script in a job of two nodes, whose srun says what it was given. Returns its words."""
    (tmp_path / "caller").mkdir()
    for name, body in {"apptainer": "", "enroot": "", "srun": 'printf "%s\\n" "$@"', "nvidia-smi": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(*overrides: str, **variables: str) -> list[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "NCCL_", "GLOO_"))}
        job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "hybrid"}
        env = kept | job | {"PATH": f"{tmp_path}:{kept['PATH']}"} | variables
        done = subprocess.run(
            ["bash", root / SCRIPT, *overrides],
            cwd=tmp_path / "caller",
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == int(variables.get("STATUS", "0")), done.stderr
        return done.stdout.splitlines() + done.stderr.splitlines()

    return run


def test_without_a_container(allocation, root, tmp_path):
    words = allocation("run_dir=a b", SRUN_OPTIONS="--mpi=none --kill-on-bad-exit=1", GPUS_PER_NODE="8")
    log = f"--output={tmp_path}/caller/logs/hybrid-7-node%n-%N.log"
    assert log in words and words[words.index("python") - 2 : words.index("python")] == [
        "--mpi=none",
        "--kill-on-bad-exit=1",
    ]
    ours = words[words.index("python") :]
    assert ours[1:4] == [f"{root}/tools/launch.py", "--gpus", "8"] and ours[-1] == "run_dir=a b"


def test_containers(allocation, root, tmp_path):
    image = tmp_path / "image.sqsh"
    image.touch()
    caller = tmp_path / "caller"
    mounts = ",".join(f"{folder}:{folder}" for folder in (root, caller, caller / "logs", tmp_path))
    common = {"CONTAINER": "../image.sqsh", "CONTAINER_MOUNTS": str(tmp_path)}
    words = allocation(**common, CONTAINER_RUNTIME="pyxis")
    assert [f"--container-image={image}", f"--container-mounts={mounts}", f"--container-workdir={caller}"] == words[
        -7:-4
    ]
    assert words[-4] == "python"
    words = allocation(**common)
    at = words.index("apptainer")
    assert words[at : at + 8] == ["apptainer", "exec", "--nv", "--bind", mounts, "--pwd", str(caller), str(image)]
    words = allocation(**common, CONTAINER_RUNTIME="enroot")
    at = words.index(f"{root}/examples/slurm/enroot_start.sh")
    assert words[at + 1 : at + 5] == [mounts, str(caller), str(image), "python"]
    words = allocation(**common, CONTAINER_RUNTIME="docker", STATUS="78")
    assert "CONTAINER_RUNTIME=docker is not known; set it to pyxis, apptainer or enroot" in words[-1]


def test_enroot_gets_the_task_s_variables(root, tmp_path):
    fake = tmp_path / "enroot"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    script = root / "examples" / "slurm" / "enroot_start.sh"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_PROCID": "3", "HOME": "/home/me"}
    command = ["bash", script, "/a:/a,/b:/b", "/folder", "image", "python", "x y.py"]
    words = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[:5] == ["start", "--mount", "/a:/a", "--mount", "/b:/b"]
    assert "SLURM_PROCID" in words and "PATH" not in words and "HOME" not in words
    assert words[-4:] == ['cd -- "$0" && exec "$@"', "/folder", "python", "x y.py"]


def test_modules_and_network(root, tmp_path):
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "bash").write_text('module() { [ "$2" != none ] && echo "loaded $2"; }\n')
    script = f'set -e; . {root}/examples/slurm/cluster.sh; load_modules; set_network; env | grep -E "^(NCCL|GLOO|OMP)_" | sort'

    def run(**variables: str) -> subprocess.CompletedProcess:
        env = {"PATH": os.environ["PATH"], "MODULESHOME": str(tmp_path)} | variables
        return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)

    done = run(MODULES="cuda/13.0 openmpi", NCCL_SOCKET_IFNAME="ib0")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["loaded cuda/13.0", "loaded openmpi"], done.stderr
    assert {"NCCL_IB_TIMEOUT=22", "NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "OMP_NUM_THREADS=1"} <= set(lines)
    assert "NCCL_IB_TIMEOUT=18" in run(NCCL_IB_TIMEOUT="18").stdout and "IFNAME" not in run().stdout
    failed = run(MODULES="none")
    assert failed.returncode == 78 and "module load none failed" in failed.stderr


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
