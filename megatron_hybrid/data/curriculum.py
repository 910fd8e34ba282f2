"""Curriculum: the size of generated samples, which grows during a run."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_hybrid.config.data import CurriculumStageConfig


class Curriculum:
    """Sizes by the index of a sample. Its state is the sample at which each stage so far began."""

    def __init__(self, stages: Sequence[CurriculumStageConfig]) -> None:
        """Create the curriculum of stages, at least one."""
        self.stages = tuple(stages)
        self._starts = self._planned([0])

    def _planned(self, starts: list[int]) -> list[int]:
        """Return the starts of all stages, of which the first are given and the others begin as late as they may."""
        for stage in self.stages[len(starts) - 1 : -1]:
            assert stage.samples is not None
            starts.append(starts[-1] + stage.samples)
        return starts

    @property
    def starts(self) -> tuple[int, ...]:
        """First sample of each stage."""
        return tuple(self._starts)

    def stage_at(self, index: int) -> int:
        """Return the number of the stage that a sample belongs to."""
        return bisect_right(self._starts, index) - 1

    def size_at(self, index: int) -> int:
        """Return the size of a sample."""
        return self.stages[self.stage_at(index)].size

    def advance(self, index: int) -> None:
        """Begin the next stage at sample `index`."""
        stage = self.stage_at(index)
        self._starts = self._planned([*self._starts[: stage + 1], index])

    def state_dict(self) -> dict[str, Any]:
        """Return the first sample of each stage, as far as it is known."""
        return {"starts": list(self._starts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state does not fit the stages.
        """
        starts = [int(start) for start in state["starts"]]
        if len(starts) != len(self.stages) or starts != sorted({*starts}) or starts[0] != 0:
            raise ValueError(f"a curriculum of {len(self.stages)} stages cannot begin them at samples {starts}")
        self._starts = starts
