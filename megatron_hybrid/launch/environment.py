"""Detect rank, local rank and world size from the environment set by torchrun, Open MPI, MPICH or SLURM. No torch here.

`Launch.from_environment` is for a process that is one rank, launch/node_environment.py for a launcher that starts a
node's ranks. `export` makes the rest of the process see what torchrun would have set.
"""

import os
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hybrid.base.errors import LaunchError
from megatron_hybrid.launch.slurm_hosts import first_host, node_address
from megatron_hybrid.launch.variables import (
    LOCAL_RANKS,
    LOCAL_SIZES,
    MPI,
    PORTS,
    RANKS,
    SIZES,
    first,
    master_port,
    number,
    port_number,
)

__all__ = ["Launch", "LaunchError", "first_host", "free_port", "master_port", "node_address"]


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together.

    `master` is where the ranks meet, (host, port); None: what MASTER_ADDR and MASTER_PORT say, or this machine alone.
    """

    rank: int
    local_rank: int
    world_size: int
    master: tuple[str, int] | None = None
    launcher: str = "none"

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "Launch":
        """Ask the launcher nearest to this process. torchrun's variables come first: others may have started torchrun.

        Raises:
            LaunchError: variables that are not numbers or that contradict each other, an mpi4py of another MPI, or ranks
                on several nodes without a place to meet.
        """
        if "RANK" in env and "WORLD_SIZE" in env and "LOCAL_RANK" in env:
            return cls(
                *(number(env, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")), None, "torchrun"
            ).checked()
        found = from_step(env)
        if found is not None and found.world_size > 1:
            return _agreeing(found.checked(), env)
        if "RANK" in env or "WORLD_SIZE" in env:
            return _one_of_each_node(env).checked()
        _alone(env)
        return found or cls(0, 0, 1)

    def checked(self) -> "Launch":
        """Return this launch, if its numbers go together."""
        if not (0 <= self.local_rank <= self.rank < self.world_size):
            names = "; RANK, LOCAL_RANK and WORLD_SIZE contradict each other" if self.launcher == "torchrun" else ""
            raise LaunchError(
                f"{self.launcher} says rank {self.rank} (local rank {self.local_rank}) of {self.world_size}; "
                f"start the ranks by one torchrun, mpirun or srun{names}"
            )
        return self

    def export(self) -> "Launch":
        """Set the variables that torchrun sets, for torch and for the processes that this one starts."""
        ours = {"RANK": self.rank, "LOCAL_RANK": self.local_rank, "WORLD_SIZE": self.world_size}
        if self.master is not None:
            ours |= {"MASTER_ADDR": self.master[0], "MASTER_PORT": self.master[1]}
        os.environ.update({name: str(value) for name, value in ours.items()})
        return self


def from_step(env: Mapping[str, str]) -> Launch | None:
    """Return what mpirun or srun say of this process; None where neither started it."""
    if any(name in env for name in MPI):
        return _from_mpi(env)
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # a batch script has a SLURM_PROCID, but no step
        return _from_variables(env, "srun")
    return None


def _agreeing(found: Launch, env: Mapping[str, str]) -> Launch:
    """Check that variables set by hand say what mpirun or srun says."""
    says = {"RANK": found.rank, "WORLD_SIZE": found.world_size, "LOCAL_RANK": found.local_rank}
    for name, value in says.items():
        if name in env and number(env, name) != value:
            raise LaunchError(
                f"{name}={env[name]} contradicts {found.launcher}, which says {value}; unset {name}, or set RANK, LOCAL_RANK "
                "and WORLD_SIZE all three for each process"
            )
    return found


def _one_of_each_node(env: Mapping[str, str]) -> Launch:
    """RANK and WORLD_SIZE without LOCAL_RANK: a job controller's, which started one process on each node."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        if there == "WORLD_SIZE" and number(env, there) == 1:
            return Launch(0, 0, 1)
        raise LaunchError(f"{there}={env[there]} is set and {missing} is not; set both, or unset {there}")
    name = "PET_NPROC_PER_NODE"
    if env.get(name, "").isdecimal() and number(env, name) > 1:
        raise LaunchError(
            f"{name}={env[name]} asks for several ranks on this node, and this process is one of them only if LOCAL_RANK is set; "
            "start them by tools/launch.py or torchrun"
        )
    return Launch(number(env, "RANK"), number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0,
                  number(env, "WORLD_SIZE"), None, "torchrun")  # fmt: skip


def _alone(env: Mapping[str, str]) -> None:
    """Check that no variable tells of other ranks, of which this process would know nothing."""
    if env.get("LOCAL_RANK", "0") != "0":
        raise LaunchError(
            f"LOCAL_RANK={env['LOCAL_RANK']} is set and RANK and WORLD_SIZE are not; set all three, or unset it"
        )
    for name in ("NNODES", "PET_NNODES"):
        if env.get(name, "").isdecimal() and number(env, name) > 1:
            raise LaunchError(
                f"{name}={env[name]} tells of other nodes, and this process has no RANK; start it by tools/launch.py or torchrun"
            )


def _from_mpi(env: Mapping[str, str]) -> Launch:
    """mpi4py knows everything; without it, the environment that mpirun or srun --mpi set must do."""
    try:
        from mpi4py import MPI as mpi
    except (ImportError, RuntimeError):  # not installed, or installed without an MPI library to load
        return _from_variables(env, "mpirun")
    world = mpi.COMM_WORLD
    started = next((number(env, name) for name in SIZES if name in env), None)
    if started is not None and started != world.size:
        raise LaunchError(
            f"mpi4py sees {world.size} of the {started} processes that were started: it is built for another MPI; "
            "rebuild it for this one (pip install --force-reinstall --no-binary mpi4py mpi4py), or uninstall it"
        )
    local = world.Split_type(mpi.COMM_TYPE_SHARED)
    return Launch(world.rank, local.rank, world.size, _master_by_mpi(world, local.size, env), "mpi4py")


def _master_by_mpi(world: Any, local_size: int, env: Mapping[str, str]) -> tuple[str, int]:
    """Broadcast rank 0's host and a port that is free there."""
    host = "127.0.0.1" if local_size == world.size else socket.gethostname()
    port = port_number(env, "MASTER_PORT") if "MASTER_PORT" in env else None
    mine = (env.get("MASTER_ADDR", host), port or free_port()) if world.rank == 0 else None
    master: tuple[str, int] = world.bcast(mine)
    return master


def free_port(among: range = PORTS) -> int:
    """A TCP port nobody listens on now, and that no connection is given by chance before rank 0, minutes later, listens there."""
    for port in random.SystemRandom().sample(among, len(among)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise LaunchError(f"none of the TCP ports {among[0]} to {among[-1]} is free here; `ss -ltnp` says who listens")


def _from_variables(env: Mapping[str, str], launcher: str) -> Launch:
    """Read the variables of Open MPI, MPICH, Intel MPI or SLURM."""
    world = first(env, SIZES, "number of ranks")
    rank = first(env, RANKS, "rank")
    one_node = any(name in env and number(env, name) == world for name in LOCAL_SIZES)
    local = rank if one_node else first(env, LOCAL_RANKS, "local rank")
    if "MASTER_ADDR" in env:
        host = env["MASTER_ADDR"]
    elif one_node or world == 1:
        host = "127.0.0.1"
    elif nodes := env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST"):
        host = node_address(first_host(nodes))
    else:
        raise LaunchError(
            "the ranks are on several nodes and nothing says where they meet; set MASTER_ADDR to the host of rank 0 "
            "(mpirun -x MASTER_ADDR), or install mpi4py (pip install mpi4py)"
        )
    return Launch(rank, local, world, (host, master_port(env)), launcher)
