"""Detect rank, local rank and world size from the environment set by torchrun, Open MPI, MPICH or SLURM. No torch here.

`Launch.from_environment` is for a process that is one rank. launch/node_environment.py is for a launcher that starts the ranks of a
node. `export` sets the variables that torchrun would have set.
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
    """Rank of this process among those that were started together.

    `master` is the rendezvous (host, port). None: MASTER_ADDR and MASTER_PORT, or this machine only.
    """

    rank: int
    local_rank: int
    world_size: int
    master: tuple[str, int] | None = None
    launcher: str = "none"

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> "Launch":
        """Return the launch that the innermost launcher describes. torchrun's variables come first, because MPI or SLURM may have
        started torchrun.

        Raises:
            LaunchError: variables that are not numbers or that contradict each other, mpi4py built for another MPI, or ranks on
                several nodes without a rendezvous.
        """
        if "RANK" in env and "WORLD_SIZE" in env and "LOCAL_RANK" in env:
            rank, local_rank, world_size = (number(env, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
            return cls(rank, local_rank, world_size, None, "torchrun").checked()
        found = from_step(env)
        if found is not None and found.world_size > 1:
            return _check_agreement(found.checked(), env)
        if "RANK" in env or "WORLD_SIZE" in env:
            return _from_node_ranks(env).checked()
        _check_single(env)
        return found or cls(0, 0, 1)

    def checked(self) -> "Launch":
        """Return this launch after checking that its numbers are consistent."""
        if not (0 <= self.local_rank <= self.rank < self.world_size):
            names = "; RANK, LOCAL_RANK and WORLD_SIZE contradict each other" if self.launcher == "torchrun" else ""
            raise LaunchError(
                f"{self.launcher} says rank {self.rank} (local rank {self.local_rank}) of {self.world_size}; "
                f"start the ranks with one torchrun, mpirun or srun{names}"
            )
        return self

    def export(self) -> "Launch":
        """Set the variables that torchrun sets, for torch and for child processes."""
        ours: dict[str, int | str] = {"RANK": self.rank, "LOCAL_RANK": self.local_rank, "WORLD_SIZE": self.world_size}
        if self.master is not None:
            ours |= {"MASTER_ADDR": self.master[0], "MASTER_PORT": self.master[1]}
        os.environ.update({name: str(value) for name, value in ours.items()})
        return self


def from_step(env: Mapping[str, str]) -> Launch | None:
    """Return the launch by mpirun or srun. None: neither of them started this process."""
    if any(name in env for name in MPI):
        return _from_mpi(env)
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # a batch script has a SLURM_PROCID, but no step
        return _from_variables(env, "srun")
    return None


def _check_agreement(found: Launch, env: Mapping[str, str]) -> Launch:
    """Check that variables set by hand agree with mpirun or srun."""
    says = {"RANK": found.rank, "WORLD_SIZE": found.world_size, "LOCAL_RANK": found.local_rank}
    for name, value in says.items():
        if name in env and number(env, name) != value:
            raise LaunchError(
                f"{name}={env[name]} contradicts {found.launcher}, which says {value}; unset {name}, or set RANK, LOCAL_RANK "
                "and WORLD_SIZE all three for each process"
            )
    return found


def _from_node_ranks(env: Mapping[str, str]) -> Launch:
    """Return the launch of a job controller, which sets RANK and WORLD_SIZE but no LOCAL_RANK and starts one process per node."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        there, missing = ("RANK", "WORLD_SIZE") if "RANK" in env else ("WORLD_SIZE", "RANK")
        if there == "WORLD_SIZE" and number(env, there) == 1:
            return Launch(0, 0, 1)
        raise LaunchError(f"{there}={env[there]} is set and {missing} is not; set both, or unset {there}")
    name = "PET_NPROC_PER_NODE"
    if env.get(name, "").isdecimal() and number(env, name) > 1:
        raise LaunchError(
            f"{name}={env[name]} asks for several ranks on this node, and this process is one of them only if LOCAL_RANK is set; "
            "start them with megatron-hybrid launch or torchrun"
        )
    return Launch(number(env, "RANK"), number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0,
                  number(env, "WORLD_SIZE"), None, "torchrun")  # fmt: skip


def _check_single(env: Mapping[str, str]) -> None:
    """Check that no variable implies other ranks, which a single process would ignore."""
    if env.get("LOCAL_RANK", "0") != "0":
        raise LaunchError(
            f"LOCAL_RANK={env['LOCAL_RANK']} is set and RANK and WORLD_SIZE are not; set all three, or unset it"
        )
    for name in ("NNODES", "PET_NNODES"):
        if env.get(name, "").isdecimal() and number(env, name) > 1:
            raise LaunchError(
                f"{name}={env[name]} implies other nodes, and this process has no RANK; start it with "
                "megatron-hybrid launch or torchrun"
            )


def _from_mpi(env: Mapping[str, str]) -> Launch:
    """Return the launch by mpi4py if it is installed, otherwise by the environment of mpirun or srun --mpi."""
    try:
        from mpi4py import MPI as mpi
    except (ImportError, RuntimeError):  # not installed, or installed without an MPI library to load
        return _from_variables(env, "mpirun")
    world = mpi.COMM_WORLD
    started = next((number(env, name) for name in SIZES if name in env), None)
    if started is not None and started != world.size:
        raise LaunchError(
            f"mpi4py sees {world.size} of the {started} processes that were started: it is built for another MPI; "
            "rebuild it for this MPI (pip install --force-reinstall --no-binary mpi4py mpi4py), or uninstall it"
        )
    local = world.Split_type(mpi.COMM_TYPE_SHARED)
    return Launch(world.rank, local.rank, world.size, _master_by_mpi(world, local.size, env), "mpi4py")


def _master_by_mpi(world: Any, local_size: int, env: Mapping[str, str]) -> tuple[str, int]:
    """Broadcast rank 0's host and a free port of it."""
    host = "127.0.0.1" if local_size == world.size else socket.gethostname()
    port = port_number(env, "MASTER_PORT") if "MASTER_PORT" in env else None
    mine = (env.get("MASTER_ADDR", host), port or free_port()) if world.rank == 0 else None
    master: tuple[str, int] = world.bcast(mine)
    return master


def free_port(among: range = PORTS) -> int:
    """Return a TCP port that is free now, and that Linux does not assign to a connection before rank 0 listens on it."""
    for port in random.SystemRandom().sample(among, len(among)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue
    raise LaunchError(f"none of the TCP ports {among[0]} to {among[-1]} is free here; `ss -ltnp` lists the listeners")


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
            "the ranks are on several nodes and no rendezvous is set; set MASTER_ADDR to the host of rank 0 "
            "(mpirun -x MASTER_ADDR), or install mpi4py (pip install mpi4py)"
        )
    return Launch(rank, local, world, (host, master_port(env)), launcher)
