"""Which node this is, from what job controllers, torchrun's variables, srun and mpirun say; and wrong or partial variables."""

import sys

import pytest

from megatron_hybrid.launch.environment import Launch, LaunchError, first_host
from megatron_hybrid.launch.node import visible_gpus
from megatron_hybrid.launch.node_environment import check_ranks, node_from_environment

MEET = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
POD = {"RANK": "1", "WORLD_SIZE": "2"} | MEET
KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "16", "PET_NODE_RANK": "1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8"} | MEET
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "127.0.0.[1-2]"}


@pytest.fixture(autouse=True)
def without_mpi4py(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)


@pytest.mark.parametrize(
    "env",
    [
        POD,
        KUBEFLOW,
        {k: v for k, v in KUBEFLOW.items() if k != "PET_NNODES"},
        {"NODE_RANK": "1", "NNODES": "2"} | MEET,
        {"PET_NODE_RANK": "1", "PET_NNODES": "2:2", "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456"},
        {"PET_NODE_RANK": "1", "PET_NNODES": "2", "PET_RDZV_ENDPOINT": "job-master-0:23456"},
        {"NODE_RANK": "1", "WORLD_SIZE": "2"} | MEET,
        {"LOCAL_RANK": "0"} | POD,
    ],
)
def test_the_second_of_two_nodes(env):
    assert node_from_environment(env) == Launch(1, 0, 2, ("job-master-0", 23456), "controller")


def test_srun_and_nobody():
    node = node_from_environment(SRUN)
    assert (node.rank, node.world_size, node.launcher) == (1, 2, "srun") and node.master[0] == "127.0.0.1"
    assert node_from_environment({}) == Launch(0, 0, 1)
    assert node_from_environment({"MASTER_PORT": "4000"}).master == ("127.0.0.1", 4000)
    assert node_from_environment({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "pod-0"}) == Launch(
        0, 0, 1, None, "controller"
    )


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            "there are 2 nodes and no rendezvous is set; set MASTER_ADDR",
        ),
        ({"RANK": "1"} | MEET, "RANK=1 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"} | MEET, "WORLD_SIZE=2 is set and RANK is not"),
        (
            {"RANK": "2", "WORLD_SIZE": "2"} | MEET,
            "RANK=2 and WORLD_SIZE=2 contradict each other: node 2 is not one of 0 to 1",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"} | MEET, "RANK='-1' is not a number"),
        ({"RANK": "", "WORLD_SIZE": "2"} | MEET, "RANK='' is not a number"),
        (POD | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a port"),
        (POD | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is not a port"),
        ({"NODE_RANK": "1"} | MEET, "NODE_RANK=1 is set and the number of nodes is not"),
        ({"NNODES": "2"} | MEET, "NNODES=2 is set and the number of this node is not"),
        ({"NODE_RANK": "1", "PET_NODE_RANK": "0", "NNODES": "2"} | MEET, "PET_NODE_RANK=0 and NODE_RANK=1 contradict"),
        ({"PET_NODE_RANK": "0", "PET_NNODES": "1:4"} | MEET, "PET_NNODES=1:4 is a range"),
        (POD | {"LOCAL_RANK": "3"}, "LOCAL_RANK=3: megatron-hybrid launch runs several times on this node"),
        (POD | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8: megatron-hybrid launch runs several times"),
        (SRUN | {"SLURM_LOCALID": "1"}, "SLURM_LOCALID=1: .*srun --ntasks-per-node=1"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 and WORLD_SIZE=2 contradict srun, which says 1 of 2"),
    ],
)
def test_what_does_not_hold_together_is_named(env, says):
    with pytest.raises(LaunchError, match=says):
        node_from_environment(env)


def test_the_ranks_of_a_node_are_those_that_the_controller_counts():
    for env in (KUBEFLOW, POD, KUBEFLOW | {"WORLD_SIZE": "2"}, {"NODE_RANK": "1", "NNODES": "2", "RANK": "8"} | MEET):
        check_ranks(node_from_environment(env), 8, env)
    for change, says in (
        ({}, "PET_NPROC_PER_NODE=8 contradicts the 4 ranks"),
        ({"PET_NPROC_PER_NODE": "gpu"}, "WORLD_SIZE=16 contradicts PET_NODE_RANK=1 and PET_NNODES=2 with 4 ranks"),
        ({"PET_NPROC_PER_NODE": "gpu", "WORLD_SIZE": "8", "RANK": "3"}, "RANK=3 contradicts"),
    ):
        with pytest.raises(LaunchError, match=says):
            check_ranks(node_from_environment(KUBEFLOW | change), 4, KUBEFLOW | change)


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "1"}, "RANK=1 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set and RANK is not"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 is set and RANK and WORLD_SIZE are not"),
        ({"NODE_RANK": "1", "NNODES": "2"}, "NNODES=2 implies other nodes, and this process has no RANK"),
        ({"PET_NNODES": "2"}, "PET_NNODES=2 implies other nodes"),
        (KUBEFLOW, "PET_NPROC_PER_NODE=8 asks for several ranks"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 contradicts srun, which says 1; unset RANK"),
        (SRUN | {"WORLD_SIZE": "16"}, "WORLD_SIZE=16 contradicts srun, which says 2"),
        (SRUN | {"MASTER_PORT": "x"}, "MASTER_PORT='x' is not a port"),
    ],
)
def test_a_rank_that_cannot_know_the_others(env, says):
    with pytest.raises(LaunchError, match=says):
        Launch.from_environment(env)


def test_a_rank_of_a_controller_with_one_process_on_each_node():
    assert Launch.from_environment(POD) == Launch(1, 0, 2, None, "torchrun")
    ours = SRUN | {
        "SLURM_LOCALID": "1",
        "RANK": "1",
        "WORLD_SIZE": "2",
    }  # exported from SLURM's own, without LOCAL_RANK
    assert (Launch.from_environment(ours).local_rank, Launch.from_environment(ours).launcher) == (1, "srun")


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("rack[1-2]node[01-04]", "rack1node01"),
        ("rack[2,1]-[003-010]-ib0,login1", "rack2-003-ib0"),
        ("c[1-3]n[2]g[07,9].example.org", "c1n2g07.example.org"),
        ("gpu-a.b-c", "gpu-a.b-c"),
        ("n[0009-0010]", "n0009"),
        ("10.0.0.[17-18]", "10.0.0.17"),
        (" n1,n2\n", "n1"),
    ],
)
def test_first_host_of_every_form(nodelist, first):
    assert first_host(nodelist) == first


@pytest.mark.parametrize("nodelist", ["", ",", "node[", "node[]", "node[a-b]", "node[1-2[3]]", "node]1", "a b"])
def test_what_is_no_host_list(nodelist):
    with pytest.raises(LaunchError, match="set MASTER_ADDR"):
        first_host(nodelist)


@pytest.mark.parametrize(
    ("named", "count"),
    [
        ("0,3", 2), ("0, 1", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), ("NoDevFiles", 0), ("none", 0),
        ("GPU-8c1f3a2b-1111-2222-3333-444455556666", 1), ("GPU-8c1f,GPU-9d2e", 2),
        ("MIG-a1b2c3d4-0000-1111-2222-333344445555", 1), ("MIG-GPU-8c1f/1/0,MIG-GPU-8c1f/2/0", 2),
    ],
)  # fmt: skip
def test_visible_gpus_are_counted_as_cuda_counts_them(named, count):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": named}) == count
