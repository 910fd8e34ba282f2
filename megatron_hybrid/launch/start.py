"""Start a rank: select its device, join the other ranks, and form the parallel groups."""

import datetime
import os

import torch.distributed as dist

from megatron_hybrid.base.errors import LaunchError
from megatron_hybrid.base.heartbeat import heartbeat
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.distributed.device import communication_backend, device_identity, has_cuda, setup_device
from megatron_hybrid.distributed.process_groups import LONGEST_WAIT_MINUTES, ProcessGroupCollection, form_groups
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.variables import port_number


def start_distributed(
    launch: Launch,
    parallel: ParallelConfig,
    seed: int,
    timeout_minutes: float = LONGEST_WAIT_MINUTES,
    quiet: bool = False,
) -> ProcessGroupCollection:
    """Select the device, join the other ranks and form the tensor, context, data and pipeline parallel groups.

    Raises:
        LaunchError: no rendezvous is set, ranks are missing, or two ranks have the same GPU.
    """
    chosen = setup_device(launch.local_rank)
    if launch.rank == 0 and not quiet:
        print(chosen, flush=True)
    if not dist.is_initialized():
        _join(launch, timeout_minutes)
        heartbeat.beat("setting up the run")
    return form_groups(parallel, seed, timeout_minutes)


def _join(launch: Launch, timeout_minutes: float) -> None:
    """Join the other ranks.

    Raises:
        LaunchError: no rendezvous is set, rank 0 cannot listen on it, ranks do not join, or two ranks share a GPU.
    """
    host, port = _rendezvous(launch)
    heartbeat.beat(f"waiting for all {launch.world_size} ranks to join at {host}:{port}")
    try:
        dist.init_process_group(
            communication_backend(),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise _cannot_join(error, launch, host, port) from None
    if has_cuda():
        _check_gpus_differ(launch)


def _rendezvous(launch: Launch) -> tuple[str, str]:
    """Set MASTER_ADDR and MASTER_PORT, which torch.distributed reads, from the launch or for a world of one, and return them."""
    if launch.master is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = launch.master[0], str(launch.master[1])
    if launch.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise LaunchError(
                f"{name} is not set, and {launch.world_size} ranks need a rendezvous; set MASTER_ADDR to the host of "
                "rank 0 and MASTER_PORT "
                "to a free port of it, or start with megatron-hybrid launch, torchrun, mpirun or srun"
            )
    if os.environ["MASTER_PORT"] != "0":
        port_number(os.environ, "MASTER_PORT")
    return os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]


def _cannot_join(error: Exception, launch: Launch, host: str, port: str) -> LaunchError:
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        return LaunchError(
            f"MASTER_PORT={port} is taken on this host: another process listens there (ss -ltnp); set it to a free port, the same on "
            "all nodes, or unset it"
        )
    return LaunchError(
        f"rank {launch.rank} of {launch.world_size} could not join the others at {host}:{port}: {str(error).splitlines()[0]}; check "
        "that all ranks are started with the same MASTER_ADDR and MASTER_PORT and can reach that host"
    )


def _check_gpus_differ(launch: Launch) -> None:
    """Check that this rank and the previous one have different GPUs, which a single visible GPU does not guarantee.

    Raises:
        LaunchError: both have the same GPU.
    """
    store = dist.distributed_c10d._get_default_store()
    mine = device_identity()
    store.set(f"gpu of rank {launch.rank}", mine)
    if launch.local_rank > 0 and store.get(f"gpu of rank {launch.rank - 1}").decode() == mine:
        raise LaunchError(
            f"ranks {launch.rank - 1} and {launch.rank} have the same GPU ({mine.strip()}); start one rank per GPU, or give each "
            "rank its own GPU (srun --gpus-per-task=1)"
        )
