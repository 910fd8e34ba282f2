"""Checks of the nodes before the first step."""

from typing import Literal

from pydantic import Field, PositiveInt

from megatron_hybrid.base.section import Section


class PreflightConfig(Section):
    """Checks of all nodes before the first step. `megatron-hybrid preflight` runs them alone."""

    enabled: bool | None = None
    """None: on if the run has more than one rank."""
    all_reduce_mib: PositiveInt | None = None
    """Size of the timed all-reduces in MiB. None: 256 on GPUs, 4 on CPU."""
    slow_below: float = Field(0.7, gt=0, lt=1)
    """A device or node below this share of the median over all nodes is slow."""
    slow_nodes: Literal["warn", "stop"] = "warn"
    """Reaction to slow nodes. Broken nodes always stop the run."""

    def is_on(self, world_size: int) -> bool:
        """Return True if a run of this many ranks begins with the checks."""
        return world_size > 1 if self.enabled is None else self.enabled
