"""Detection of rank and world size from each launcher's variables, and launchers that start the same run."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hybrid.launch.environment import Launch, LaunchError, first_host, free_port, master_port
from testing.launchers import MPIRUN, curve, launchers, write_run


@pytest.fixture(autouse=True)
def without_mpi4py(monkeypatch):
    """Hide mpi4py, which is tested under a real mpirun."""
    monkeypatch.setitem(sys.modules, "mpi4py", None)


def test_a_process_alone():
    assert Launch.from_environment({}) == Launch(0, 0, 1)


def test_a_batch_script_is_no_rank():
    """sbatch leaves a SLURM_PROCID and a SLURM_NTASKS in the script's own environment."""
    assert Launch.from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}) == Launch(0, 0, 1)


TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    ("env", "launcher", "host"),
    [
        (TORCHRUN, "torchrun", None),
        (TORCHRUN | SRUN | OPEN_MPI, "torchrun", None),
        (OPEN_MPI | {"MASTER_ADDR": "host7"}, "mpirun", "host7"),
        ({"PMI_SIZE": "8", "PMI_RANK": "5", "MPI_LOCALRANKID": "1", "MASTER_ADDR": "host7"}, "mpirun", "host7"),
        (SRUN, "srun", "127.0.0.1"),
        (SRUN | {"PMIX_RANK": "5"}, "mpirun", "127.0.0.1"),
    ],
    ids=["torchrun", "torchrun under others", "Open MPI", "MPICH", "srun", "srun --mpi=pmix"],
)
def test_each_launcher(env, launcher, host):
    found = Launch.from_environment(env)
    assert (found.rank, found.local_rank, found.world_size, found.launcher) == (5, 1, 8, launcher)
    assert (found.master and found.master[0]) == host


def test_ranks_of_one_node_meet_there():
    launch = Launch.from_environment(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"})
    assert launch.master and launch.master[0] == "127.0.0.1" and launch.local_rank == 5


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"rank 2 .* of 2; start the ranks with one"),
        (OPEN_MPI, "set MASTER_ADDR to the host of rank 0"),
        ({k: v for k, v in OPEN_MPI.items() if "RANK" not in k}, "none of .* gives the rank"),
        (
            SRUN | {"SLURM_STEP_NODELIST": "no-such-host.invalid"},
            "no-such-host.invalid, does not resolve; set MASTER_ADDR",
        ),
    ],
)
def test_what_does_not_hold_together(env, says):
    with pytest.raises(LaunchError, match=says):
        Launch.from_environment(env)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("node[03-17,20],login1", "node03"),
        ("a1,b2", "a1"),
        ("gpu[1,9]-ib", "gpu1-ib"),
        ("rack2-[001-004].cluster,x", "rack2-001.cluster"),
    ],
)
def test_first_host(nodelist, first):
    assert first_host(nodelist) == first


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="no scontrol here to compare with")
@pytest.mark.parametrize("nodelist", ["node7", "node[03-17,20],login1", "a1,b2", "rack2-[001-004],x"])
def test_first_host_is_what_slurm_says(nodelist, tmp_path):
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=x\nSlurmctldHost=localhost\nNodeName=x\nPartitionName=p Nodes=x\n"
    )
    env = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    listing = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, env=env)
    assert listing.stdout.split()[0] == first_host(nodelist)


def test_ports_differ_by_job_and_agree_within_one():
    assert master_port(SRUN) == master_port(SRUN | {"SLURM_PROCID": "0"}) != master_port(SRUN | {"SLURM_JOB_ID": "78"})
    assert all(1024 < master_port({"SLURM_JOB_ID": str(job)}) < 32768 for job in range(1000))
    assert master_port({"MASTER_PORT": "1234"}) == 1234


def test_free_ports_are_none_that_anybody_listens_on_or_is_given():
    """A port that Linux hands out could be another connection's by the time rank 0 has imported torch and listens."""
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = free_port()
    assert port < given
    with socket.create_server(("", port)):
        with pytest.raises(LaunchError, match=f"none of the TCP ports {port} to {port} is free"):
            free_port(range(port, port + 1))
    assert free_port(range(port, port + 1)) == port


def test_export_leaves_what_torchrun_leaves(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    Launch(3, 1, 4, ("here", 99)).export()
    found = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here", "MASTER_PORT": "99"}
    assert os.environ == found


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here")
def test_every_launcher_gives_the_same_curve(root, tmp_path):
    """torchrun, tools/launch.py, and mpirun with and without mpi4py: one curve, to the last bit."""
    config = write_run(tmp_path, steps=3)
    curves = {
        name: curve(command, variables, root, config, tmp_path / f"run-{number}")
        for number, (name, (command, variables)) in enumerate(launchers(tmp_path).items())
    }
    assert len(curves["torchrun"]) == 3
    assert all(found == curves["torchrun"] for found in curves.values()), curves


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here")
def test_mpi_ranks_from_mpi4py_and_a_foreign_mpi4py(root, tmp_path):
    ask = "from megatron_hybrid.launch.environment import Launch as L; x = L.from_environment(); print(x)"
    done = subprocess.run([*MPIRUN, sys.executable, "-c", ask], cwd=root, capture_output=True, text=True, timeout=60)
    # mpirun may put two ranks' words on one line
    found = sorted(words.strip() for words in done.stdout.split("Launch(")[1:])
    assert len(found) == 2, done.stdout + done.stderr
    assert "rank=0, local_rank=0, world_size=2" in found[0] and "rank=1, local_rank=1, world_size=2" in found[1]
    assert found[0].split("master=")[1] == found[1].split("master=")[1], "they meet at the same place"
    # One that sees no other rank, as when it was built for another MPI library.
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("class MPI:\n    class COMM_WORLD:\n        size = 1\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*MPIRUN, sys.executable, "-c", ask], cwd=root, capture_output=True, text=True, timeout=60, env=env
    )
    assert done.returncode and "mpi4py sees 1 of the 2 processes that were started" in done.stdout + done.stderr
