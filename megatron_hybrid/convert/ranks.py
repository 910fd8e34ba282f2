"""Sharing a conversion over processes: MPI ranks where `mpirun` started them, else this process alone."""

import os
import time
from collections.abc import Sequence
from typing import Any

from megatron_hybrid.convert.errors import ConversionError

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
"""Set by Open MPI's, MPICH's and Intel MPI's `mpirun`."""


class Ranks:
    """This process among those that convert together."""

    def __init__(self, communicator: Any = None):
        self._communicator = communicator
        self.rank: int = communicator.Get_rank() if communicator else 0
        self.size: int = communicator.Get_size() if communicator else 1

    def agree(self, error: BaseException | None) -> None:
        """Wait for all; if one of them failed, all fail.

        Raises:
            the error handed in, or another rank's as an OSError or a ConversionError.
        """
        told = (isinstance(error, OSError), f"{type(error).__name__}: {error}") if error else None
        self._wait_for_all()
        everyone = self._communicator.allgather(told) if self._communicator else [told]
        if error:
            raise error
        for rank, other in enumerate(everyone):
            if other:
                raise (OSError if other[0] else ConversionError)(f"rank {rank} failed: {other[1]}")

    def _wait_for_all(self) -> None:
        """Sleep until every rank is here: MPI's own waiting would take a core from those that still work."""
        if self._communicator:
            barrier = self._communicator.Ibarrier()
            while not barrier.Test():
                time.sleep(0.01)

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Indices of the files that this rank writes: the largest first, each to the rank with the least so far."""
        loads, mine = [0] * self.size, []
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            rank = loads.index(min(loads))
            loads[rank] += sizes[index]
            if rank == self.rank:
                mine.append(index)
        return sorted(mine)


def find_ranks() -> Ranks:
    """The MPI ranks that `mpirun` started, or this process alone.

    Raises:
        ConversionError: under `mpirun`, but mpi4py is missing; every process would convert everything.
    """
    if max(int(os.environ.get(name) or 1) for name in _SIZE_VARIABLES) <= 1:
        return Ranks()
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConversionError(
            f"started by mpirun, but mpi4py cannot be imported ({error}); pip install mpi4py, or run without mpirun"
        ) from None
    return Ranks(MPI.COMM_WORLD)
