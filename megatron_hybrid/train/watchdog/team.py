"""The ranks of a run and their processes, known to every rank in case some of them stop responding."""

import os
import signal
from dataclasses import dataclass
from typing import Any, Self

import torch.distributed as dist

from megatron_hybrid.base.process import ProcessIdentity
from megatron_hybrid.distributed.device import node_name


@dataclass(frozen=True)
class Team:
    """All ranks, seen from one of them."""

    rank: int
    hosts: dict[int, str]
    processes: dict[int, ProcessIdentity]
    token: str
    """Name of this start of the run, the same on every rank."""

    @property
    def size(self) -> int:
        return len(self.hosts)

    @property
    def host(self) -> str:
        return self.hosts[self.rank]

    @classmethod
    def alone(cls) -> Self:
        """Return the team of a rank that has not joined the others yet."""
        rank = int(os.environ.get("RANK", "0"))
        return cls(rank, {rank: node_name()}, {}, f"start-{os.getpid()}")

    @classmethod
    def of_all_ranks(cls) -> Self:
        """Exchange the identities of all ranks. Every rank calls it."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (node_name(), ProcessIdentity.current()))
        hosts = {rank: host for rank, (host, _) in enumerate(found)}
        processes = {rank: process for rank, (_, process) in enumerate(found)}
        first = processes[0]
        return cls(dist.get_rank(), hosts, processes, f"{first.host}-{first.pid}-{first.started}")

    def kill_on_this_host(self, ranks: set[int]) -> None:
        """Kill those of the given ranks that are processes of this host. A stopped process does not end otherwise."""
        for rank in ranks:
            if rank in self.processes and self.processes[rank].has_ended() is False:
                os.kill(self.processes[rank].pid, signal.SIGKILL)
