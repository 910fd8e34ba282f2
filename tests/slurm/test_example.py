"""examples/pretrain_hybrid_7b.sh on a SLURM cluster: it submits itself, requeues, resumes, and ends with the right status."""

import math
import os
import re
import subprocess
from ctypes import CDLL

import pytest

from megatron_hybrid.checkpoint.folders import complete_checkpoints
from testing.slurm_cluster import NODES, Slowed, wait_for
from tests.slurm.conftest import SCRIPT

FOR_EVER, AFTERWARDS = 100_000, 20  # steps: slurmctld looks at time limits every 30 s, and the run must not end before
CURVE = ("step", "loss", "z_loss", "grad_norm", "lr", "tokens")


def curve(lines: list[dict]) -> list[tuple]:
    return [tuple(line[key] for key in CURVE) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_time_limit_s_signal_requeues_and_the_run_resumes(example, cluster):
    """The job's time limit is cut once it trains, SLURM warns it, and the curve is that of a run nobody disturbed."""
    schedule = {"warmup_steps": 2, "decay_steps": 1000}  # which does not depend on train.steps
    example.config["train"] |= {
        "steps": FOR_EVER,
        "micro_batch_size": 4,
        "schedule": schedule,
        "optimizer": {"lr": 3e-3},
    }
    # Warned 120 s before its end, which from the next look of slurmctld (every 30 s) is at once.
    submitted = example.submit(SBATCH_SIGNAL="B:USR1@120")
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[-1]
    example.wait_for(lambda: len(example.metrics()) >= 3, "three steps", 120)
    minutes = 2 + seconds(cluster.job(job)["RunTime"]) // 60
    cluster.output("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    with Slowed(f"{example.folder}/config.yaml"):
        example.wait_for(lambda: "requeueing job" in example.log(), "the warning", 90)
    (saved,) = complete_checkpoints(example.run_dir / "checkpoints")
    stopped_at = int(saved.name.removeprefix("step-"))
    assert stopped_at >= 3, "the signal came while it trained"
    example.wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", "the requeued job", 30)
    cluster.output("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    steps = example.config["train"]["steps"] = stopped_at + AFTERWARDS
    example.variables()  # writes the configuration, which the job reads when it starts again

    ended = example.wait_for_end(job, 240)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), example.log()
    assert f"asked to stop: saved step {stopped_at} of {FOR_EVER}" in example.log()
    assert f"resumed from {saved}" in example.log() and len(example.metrics()) == steps
    assert "preflight: 2 nodes, 4 ranks" in example.log() and all(f"\n  {node} " in example.log() for node in NODES)

    # On one machine, without SLURM: the same script, four ranks, undisturbed.
    straight = example.folder / "straight"
    alone = subprocess.run(
        ["bash", SCRIPT, f"run_dir={straight}"],
        cwd=example.root,
        env=os.environ | example.variables(CPU_RANKS="4", PATH=without_sbatch(example.folder)),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert alone.returncode == 0, alone.stderr
    assert "preflight: 1 node, 4 ranks" in alone.stdout
    assert curve(example.metrics()) == curve(example.metrics(straight)), "the same numbers, to the last bit"
    assert example.metrics()[-1]["loss"] < math.log(97) - 0.2, "and they fall"


@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(example, cluster):
    """scancel sends SIGTERM: the same save, and no requeue against the user's wish."""
    example.config["train"]["steps"] = FOR_EVER
    job = example.submit(CPU_RANKS="1").stdout.split()[-1]
    example.wait_for(lambda: len(example.metrics()) >= 3, "three steps", 120)
    cluster.output("scancel", job)
    ended = example.wait_for_end(job, 60)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("CANCELLED", "75:0", "0"), example.log()
    (saved,) = complete_checkpoints(example.run_dir / "checkpoints")
    assert f"asked to stop: saved step {int(saved.name.removeprefix('step-'))} of" in example.log()
    assert "requeueing" not in example.log()


def seconds(clock: str) -> int:
    """SLURM's 00:01:30."""
    hours, minutes, rest = map(int, clock.split(":"))
    return 3600 * hours + 60 * minutes + rest


def without_sbatch(folder) -> str:
    """PATH without the directories of SLURM's commands; what else is in them is linked."""
    (links := folder / "bin").mkdir()
    kept = []
    for place in os.environ["PATH"].split(":"):
        if not os.path.exists(f"{place}/sbatch"):
            kept.append(place)
            continue
        for name in os.listdir(place):
            if name != "sbatch" and not (links / name).exists():
                (links / name).symlink_to(os.path.join(place, name))
    return ":".join([*kept, str(links)])


def test_a_wrong_override_is_not_even_submitted(example, cluster):
    done = example.submit("train.global_batch_size=7")
    assert done.returncode == 78
    assert "train.global_batch_size: 7 is not a multiple of" in done.stderr and "Traceback" not in done.stderr
    assert cluster.output("squeue", "-h") == ""


def test_a_wrong_override_in_a_job_ends_it_with_78(example):
    job = example.sbatch("train.global_batch_size=7")
    assert job["ExitCode"] == "78:0", example.log()
    assert example.log().count("train.global_batch_size: 7 is not a multiple of") == 1, "one rank of four says it"
    assert "Traceback" not in example.log() and "requeueing" not in example.log()


@pytest.mark.slow
def test_a_full_disk_is_seen_before_the_first_step(example, small_disk):
    example.config["run_dir"] = str(small_disk / "run")
    (small_disk / "filler").write_bytes(bytes((4 << 20) - (96 << 10)))
    job = example.sbatch(CPU_RANKS="1")
    assert job["ExitCode"] == "78:0", example.log()
    for node in NODES:
        assert re.search(
            rf"{node}: run_dir {small_disk}/run has .* free, and a checkpoint takes .*; make room", example.log()
        )
    assert "Traceback" not in example.log() and not example.metrics()


@pytest.mark.slow
def test_a_disk_that_fills_up_on_the_way_keeps_its_own_status(example, small_disk):
    """Room for a checkpoint at the start, and none when it is written: the ranks' own error, on every node at once."""
    example.config["run_dir"] = str(small_disk / "run")
    (small_disk / "filler").write_bytes(bytes((4 << 20) - (1400 << 10)))
    example.config["train"]["steps"] = 200
    example.config["checkpoint"] = {"interval": 1, "keep_last": None}
    job = example.sbatch(CPU_RANKS="1")
    assert job["ExitCode"] == "78:0", example.log()
    assert "No space left on device" in example.log()
    assert "Exited with exit code 78" in example.log()
    assert complete_checkpoints(example.run_dir / "checkpoints"), "those before it stay"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_cluster_without_usable_nodes(example, cluster):
    cluster.output("scontrol", "update", f"NodeName={','.join(NODES)}", "State=DOWN", "Reason=test")
    try:
        wait_for(lambda: not cluster.usable_nodes(), "nodes to go down", 20)
        done = example.submit()
    finally:
        cluster.output("scontrol", "update", f"NodeName={','.join(NODES)}", "State=RESUME")
    assert done.returncode == 69
    assert "0 nodes are up and NODES=2" in done.stderr and "sinfo -R" in done.stderr
    assert cluster.output("squeue", "-h") == "", "nothing was queued"
    wait_for(lambda: cluster.usable_nodes() == set(NODES), "nodes to come back", 30)


@pytest.mark.slow
def test_srun_starts_ranks_without_a_launcher(example, cluster):
    """`srun python tools/pretrain.py`, and `srun --mpi=pmix`: ranks and meeting point from SLURM."""
    try:
        CDLL("libpmix.so")  # SLURM opens this name, which is in the development package
    except OSError:
        pytest.skip("no libpmix.so here (apt-get install libpmix-dev)")
    environment = example.variables()
    for mpi, nodes in (("none", 2), ("pmix", 1)):
        command = [
            "srun",
            f"--mpi={mpi}",
            f"--nodes={nodes}",
            "--ntasks=2",
            "--overcommit",
            "python",
            "tools/pretrain.py",
        ]
        done = cluster.run(
            "env", f"--chdir={example.root}", *command, environment["CONFIG"], f"run_dir={example.folder}/{mpi}"
        )
        assert done.returncode == 0, done.stdout + done.stderr
    one, other = (example.metrics(example.folder / mpi) for mpi in ("none", "pmix"))
    assert len(one) == 4 and curve(one) == curve(other)


@pytest.mark.slow
def test_an_array_of_containers_from_the_caller_s_folder(example, cluster):
    """Relative paths, a dependency, one log per node, and a container runtime that stands in for apptainer and records its words."""
    caller, binaries = example.folder, example.folder / "bin"
    binaries.mkdir()
    (binaries / "apptainer").write_text(
        '#!/bin/bash\necho "$@" >>"$RECORD"\nshift 6\nexec "$@"\n'
    )  # exec, two options, image
    (binaries / "apptainer").chmod(0o755)
    image = caller / "image.sif"
    image.touch()
    example.config["data"]["train"][0]["path"] = "tokens.npy"
    example.config["parallel"] = {}
    first = cluster.output("sbatch", "--parsable", "--nodes=1", "--output=/dev/null", "--wrap=true")
    more = {"NODES": "1", "CPU_RANKS": "1", "RUN_DIR": "runs/{task}", "ARRAY": "0-1", "DEPENDENCY": f"afterok:{first}"}
    more |= {
        "CONTAINER": "image.sif",
        "CONTAINER_RUNTIME": "apptainer",
        "RECORD": str(caller / "record"),
        "LOG_DIR": "logs",
    }
    more |= {"PATH": f"{binaries}:{os.environ['PATH']}", "EXCLUSIVE": "yes", "MEM": "100"}
    command = ["env", f"--chdir={caller}", "bash", example.root / SCRIPT, "train.seed=1{task}"]
    submitted = cluster.run(*command, **example.variables(**more))
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[-1]
    for task in (0, 1):
        ended = example.wait_for_end(f"{job}_{task}", 120)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), example.log()
        assert len(example.metrics(caller / "runs" / str(task))) == 4
        (log,) = (caller / "logs").glob(f"hybrid-7b-{job}_{task}-node0-*.log")
        assert "done: 4 steps" in log.read_text()
    assert ended["OverSubscribe"] == "NO" and ended["MinMemoryNode"] == "100M"
    words = (caller / "record").read_text().splitlines()
    bound = ",".join(f"{folder}:{folder}" for folder in (example.root, caller, caller / "logs"))
    assert len(words) == 2 and f"exec --bind {bound} --pwd {caller} {image} python " in words[0]
