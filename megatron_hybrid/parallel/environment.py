"""Who am I: this process among those that one command started, told from what its launcher left. No torch here.

`torchrun`, `mpirun`, `srun`, `srun --mpi=pmix`, tools/launch.py, or nobody: `Launch.from_environment` knows each of them, and
`export` makes the rest of the process see what torchrun would have set.
"""

import os
import random
import re
import socket
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hybrid.config.errors import UserError

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""How many processes: Open MPI's mpirun, MPICH's and Intel's, and srun."""
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
_LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Any of these: started as an MPI process."""
_PORTS = range(20000, 32000)
"""Where ranks meet: below 32768, where Linux begins to hand out ports to whoever asks."""


class LaunchError(UserError):
    """The launcher left something that does not hold together; says what, and what to do."""


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
            LaunchError: variables that are no numbers or that contradict each other, an mpi4py of another MPI, or ranks on
                several nodes of which nothing says where they are to meet.
        """
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, local, world = (_number(env, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
            return cls(rank, local, world, None, "torchrun")._checked()
        if any(name in env for name in _MPI):
            return _from_mpi(env)._checked()
        if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # a batch script has a SLURM_PROCID, but no step
            return _from_variables(env, "srun")._checked()
        return cls(0, 0, 1)

    def _checked(self) -> "Launch":
        if not (0 <= self.local_rank <= self.rank < self.world_size):
            raise LaunchError(
                f"{self.launcher} says rank {self.rank} (local rank {self.local_rank}) of {self.world_size}; "
                "start the ranks by one torchrun, mpirun or srun"
            )
        return self

    def export(self) -> "Launch":
        """Set the variables that torchrun sets, for torch and for the processes that this one starts."""
        ours = {"RANK": self.rank, "LOCAL_RANK": self.local_rank, "WORLD_SIZE": self.world_size}
        if self.master is not None:
            ours |= {"MASTER_ADDR": self.master[0], "MASTER_PORT": self.master[1]}
        os.environ.update({name: str(value) for name, value in ours.items()})
        return self


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env.get(name, "0"))
    except ValueError:
        raise LaunchError(
            f"{name}={env[name]!r} is not a number; unset it, or start by torchrun, mpirun or srun"
        ) from None


def _first(env: Mapping[str, str], names: tuple[str, ...], what: str) -> int:
    for name in names:
        if name in env:
            return _number(env, name)
    raise LaunchError(f"none of {', '.join(names)} tells the {what}; start by torchrun, mpirun or srun")


def _from_mpi(env: Mapping[str, str]) -> Launch:
    """mpi4py knows everything; without it, what mpirun or srun --mpi left in the environment must do."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # not installed, or installed without an MPI library to load
        return _from_variables(env, "mpirun")
    world = MPI.COMM_WORLD
    started = next((_number(env, name) for name in _SIZES if name in env), None)
    if started is not None and started != world.size:
        raise LaunchError(
            f"mpi4py sees {world.size} of the {started} processes that were started: it is built for another MPI; "
            "rebuild it for this one (pip install --force-reinstall --no-binary mpi4py mpi4py), or uninstall it"
        )
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    return Launch(world.rank, local.rank, world.size, _master_by_mpi(world, local.size, env), "mpi4py")


def _master_by_mpi(world: Any, local_size: int, env: Mapping[str, str]) -> tuple[str, int]:
    """Rank 0's host and a port that is free there, told to all."""
    host = "127.0.0.1" if local_size == world.size else socket.gethostname()
    mine = (env.get("MASTER_ADDR", host), int(env.get("MASTER_PORT", 0)) or free_port()) if world.rank == 0 else None
    master: tuple[str, int] = world.bcast(mine)
    return master


def free_port(among: range = _PORTS) -> int:
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
    """Of Open MPI, MPICH, Intel MPI or SLURM."""
    world = _first(env, _SIZES, "number of ranks")
    rank = _first(env, _RANKS, "rank")
    one_node = any(name in env and _number(env, name) == world for name in _LOCAL_SIZES)
    local = rank if one_node else _first(env, _LOCAL_RANKS, "local rank")
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


def master_port(env: Mapping[str, str]) -> int:
    """MASTER_PORT, or one derived from the job's name, the same on all ranks: two jobs of one node hardly ever meet there."""
    if "MASTER_PORT" in env:
        return _number(env, "MASTER_PORT")
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    return _PORTS[zlib.crc32("/".join(env.get(name, "") for name in names).encode()) % len(_PORTS)]


def first_host(nodelist: str) -> str:
    """The first host of SLURM's `node[03-17,20],login1`: node03."""
    match = re.match(r"(?P<prefix>[^\[,]*)(?:\[(?P<first>\d+)[^\]]*\](?P<suffix>[^\[,]*))?", nodelist)
    if match is None or not match[0]:
        raise LaunchError(f"SLURM's node list {nodelist!r} has no host; set MASTER_ADDR to the host of rank 0")
    return match["prefix"] + (match["first"] or "") + (match["suffix"] or "")


def node_address(node: str) -> str:
    """A name or an address at which a SLURM node is reached: its own name, or the NodeAddr that SLURM knows it by."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        pass
    try:
        shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, timeout=60).stdout
    except OSError:
        shown = ""
    if match := re.search(r"\bNodeAddr=(\S+)", shown):
        return match[1]
    raise LaunchError(f"the first node, {node}, does not resolve; set MASTER_ADDR to an address of it")
