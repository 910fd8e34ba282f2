"""Collectives of this rank, read from PyTorch's flight recorder: the last one of each process group, and those not finished."""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist

BUFFER = "TORCH_FR_BUFFER_SIZE"
_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")  # collectives over NCCL, and over gloo


def enable_flight_recorder() -> None:
    """Make PyTorch record collectives, unless the environment says otherwise. Call it before process groups are formed."""
    os.environ.setdefault(BUFFER, "2000")


@dataclass
class GroupState:
    """State of one process group on one rank."""

    ranks: list[int]
    """Ranks of the world in this group."""
    entered: int = 0
    """Number of the last collective that this rank has entered."""
    operation: str = ""
    """Name and sizes of that collective: `all_reduce [4096]`."""
    waits: bool = False
    """True if that collective has not finished on this rank."""


@dataclass
class Collectives:
    """Process groups of this rank by name."""

    groups: dict[str, GroupState] = field(default_factory=dict)
    descriptions: dict[str, str] = field(default_factory=dict)

    def waiting(self) -> list[str]:
        """Return the collectives in which this rank waits, as text."""
        return [f"{g.operation} (number {g.entered} of {self.label(n)})" for n, g in self.groups.items() if g.waits]

    def label(self, name: str) -> str:
        """Return a group's description, or its name."""
        return self.descriptions.get(name) or f"group {name}"

    @classmethod
    def of_this_rank(cls) -> Self:
        """Read PyTorch's records. Groups without collectives are included. Empty if PyTorch has no flight recorder."""
        found = cls()
        if not dist.is_initialized():
            return found
        world = dist.distributed_c10d._world
        for group, name in list(world.pg_names.items()):
            found.groups[name] = GroupState(sorted(world.pg_group_ranks.get(group, {})))
            found.descriptions[name] = (getattr(group, "group_desc", "") or "").replace("undefined", "")
        for entry in _entries():
            found._add(entry)
        return found

    def _add(self, entry: dict[str, Any]) -> None:
        name = entry["process_group"][0]
        state = self.groups.setdefault(name, GroupState([]))
        number = entry["collective_seq_id"]
        if entry.get("is_p2p") or number < state.entered:
            return
        state.entered = number
        sizes = ", ".join(str(size) for size in entry.get("input_sizes", [])[:2])
        state.operation = f"{entry['profiling_name'].rpartition(':')[2]} {sizes}".strip()
        state.waits = not entry.get("retired", True) and entry.get("state") != "completed"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls({name: GroupState(**group) for name, group in data["groups"].items()}, data["descriptions"])


def _entries() -> list[dict[str, Any]]:
    """Return the recorded collectives, oldest first."""
    entries: list[dict[str, Any]] = []
    for name in _DUMPS:
        # private functions, which a version of PyTorch may lack or call otherwise; a report without them is still of use
        with contextlib.suppress(AttributeError, TypeError, ValueError, RuntimeError):
            entries += json.loads(getattr(torch._C._distributed_c10d, name)()).get("entries", [])
    return sorted(entries, key=lambda entry: entry.get("time_created_ns", 0))
