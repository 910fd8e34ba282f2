"""Processes that share a conversion: the MPI ranks that `mpirun` started, or this process alone."""

import os
import time
from collections.abc import Sequence
from typing import Any

from megatron_hybrid.convert.errors import ConversionError

_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS")
"""Variables that `mpirun` of Open MPI, MPICH and Intel MPI set."""


class Ranks:
    """This process among those that share a conversion."""

    def __init__(self, communicator: Any = None) -> None:
        self._communicator = communicator
        self.rank: int = communicator.Get_rank() if communicator else 0
        self.size: int = communicator.Get_size() if communicator else 1

    def agree(self, error: BaseException | None) -> None:
        """Wait for all ranks. If one of them failed, all raise.

        Raises:
            BaseException: this rank's error.
            OSError, ConversionError: another rank's error.
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
        """Sleep until every rank is here. MPI itself polls, which would take a core from ranks that still work."""
        if self._communicator:
            barrier = self._communicator.Ibarrier()
            while not barrier.Test():
                time.sleep(0.01)

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Return the indices of this rank's files. The largest come first, each to the rank with the fewest bytes so far."""
        loads = [0] * self.size
        mine: list[int] = []
        for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            rank = loads.index(min(loads))
            loads[rank] += sizes[index]
            if rank == self.rank:
                mine.append(index)
        return sorted(mine)


def find_ranks() -> Ranks:
    """Return the MPI ranks that `mpirun` started, or this process alone.

    Raises:
        ConversionError: `mpirun` started this process, but mpi4py is missing. Every process would convert everything.
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
