"""Which GPU a rank takes, and ranks that cannot meet. torch.cuda is a stand-in: the rule is what is tested."""

import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.distributed import device
from megatron_hybrid.launch import start as launch
from megatron_hybrid.launch.environment import Launch, LaunchError, free_port


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"),
    [(0, 1, 0), (3, 1, 0), (0, 8, 0), (7, 8, 7), (1, 2, 1)],
)
def test_a_single_visible_gpu_is_the_rank_s_own(local_rank, visible, index):
    assert device.device_index(local_rank, visible) == index


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2")
    with pytest.raises(
        LaunchError, match="local rank 2 has no GPU: 2 visible .CUDA_VISIBLE_DEVICES=GPU-1,GPU-2.; start at most 2"
    ):
        device.device_index(2, 2)


@pytest.mark.parametrize(
    ("uuids", "visible", "apart"),
    [
        (("a", "b"), ("0", "0"), True),
        (("a", "a"), ("0", "0"), False),
        (("a", "a"), ("MIG-1", "MIG-2"), True),
        (("a", "a"), ("MIG-1", "MIG-1"), False),
        (("a", "a"), ("GPU-a", "0"), False),
    ],
)
def test_two_ranks_must_not_share_a_gpu(monkeypatch, uuids, visible, apart):
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for rank in (0, 1):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible[rank])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, rank=rank: SimpleNamespace(uuid=uuids[rank]))
        if rank == 0 or apart:
            launch._check_gpus_differ(Launch(rank, rank, 2))
        else:
            with pytest.raises(LaunchError, match="ranks 0 and 1 have the same GPU .*; start one rank per GPU"):
                launch._check_gpus_differ(Launch(rank, rank, 2))


@pytest.fixture
def meeting(monkeypatch):
    """Variables of a rank that something started; no group was formed."""
    if dist.is_initialized():
        pytest.skip("this process is a rank already")

    def set_to(**variables: str) -> None:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


def test_a_port_that_is_taken(meeting):
    with socket.socket() as other:
        other.bind(("", port := free_port()))
        other.listen()
        meeting(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with pytest.raises(LaunchError, match=f"MASTER_PORT={port} is taken on this host: another process listens"):
            launch.start_distributed(Launch(0, 0, 1), ParallelConfig(), seed=0, quiet=True)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "MASTER_ADDR is not set, and 2 ranks need a rendezvous"),
        ({"MASTER_ADDR": "here"}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": "here", "MASTER_PORT": "x"}, "MASTER_PORT='x' is not a port"),
    ],
)
def test_no_place_to_meet(meeting, variables, says):
    meeting(**variables)
    with pytest.raises(LaunchError, match=says):
        launch.start_distributed(Launch(1, 1, 2), ParallelConfig(), seed=0, quiet=True)


def test_ranks_that_do_not_come(meeting):
    meeting(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with pytest.raises(
        LaunchError, match="rank 0 of 2 could not join the others at 127.0.0.1:.*check that all ranks are started"
    ):
        launch.start_distributed(Launch(0, 0, 2), ParallelConfig(), seed=0, timeout_minutes=0.02, quiet=True)
