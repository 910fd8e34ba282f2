"""Environment variables of launchers. Errors name the variable. No torch here."""

import zlib
from collections.abc import Iterable, Mapping

from megatron_hybrid.base.errors import LaunchError

Environment = Mapping[str, str]

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Number of processes, set by Open MPI, by MPICH and Intel MPI, and by srun."""
RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
LOCAL_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Variables that MPI processes have."""
LAUNCH_RESTARTS = "LAUNCH_RESTARTS"
"""Number of times that megatron-hybrid launch has restarted the ranks."""
_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", LAUNCH_RESTARTS)
PORTS = range(20000, 32000)
"""Ports for the rendezvous. Linux assigns ports from 32768 on to connections."""


def number(env: Environment, name: str) -> int:
    """Return the number in a variable.

    Raises:
        LaunchError: the variable is not a whole number of at least 0.
    """
    text = env[name].strip()
    if not (text.isascii() and text.isdecimal()):
        raise LaunchError(f"{name}={env[name]!r} is not a number; unset it, or start with torchrun, mpirun or srun")
    return int(text)


def first(env: Environment, names: Iterable[str], what: str) -> int:
    """Return the number of the first of `names` that is set.

    Raises:
        LaunchError: none of them is set.
    """
    for name in names:
        if name in env:
            return number(env, name)
    raise LaunchError(f"none of {', '.join(names)} gives the {what}; start with torchrun, mpirun or srun")


def contradiction(env: Environment, *names: str, why: str) -> LaunchError:
    """Return an error about variables that contradict each other."""
    words = [f"{name}={env[name]}" for name in names if name in env]
    return LaunchError(f"{' and '.join(words)} contradict each other: {why}")


def restart_count(env: Environment) -> int:
    """Return how often SLURM, torchrun and megatron-hybrid launch have restarted this run by themselves."""
    return sum(number(env, name) for name in _RESTARTS if env.get(name))


def port_number(env: Environment, name: str) -> int:
    """Return the TCP port in a variable.

    Raises:
        LaunchError: the variable is not a port.
    """
    text = env[name].strip()
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 65536):
        raise LaunchError(
            f"{name}={env[name]!r} is not a port; set it to a free one, 1024 to 65535, the same on all nodes"
        )
    return int(text)


def master_port(env: Environment) -> int:
    """Return MASTER_PORT, or a port derived from the job's ID, which is the same on all ranks."""
    for name in ("MASTER_PORT", "PET_MASTER_PORT"):
        if name in env:
            return port_number(env, name)
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    return PORTS[zlib.crc32("/".join(env.get(name, "") for name in names).encode()) % len(PORTS)]
