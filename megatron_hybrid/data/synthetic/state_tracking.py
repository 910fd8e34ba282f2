"""State tracking: the value of a variable after `size` swaps, as in a Python program that asserts it.

    a = 2
    b = 0
    ...
    a, c = c, a
    e, b = b, e
    assert c == 2

With five variables, this is the word problem of the symmetric group S5 on transpositions.
"""

from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt

from megatron_hybrid.config.generators import GeneratedTokens, SampleGenerator, register
from megatron_hybrid.data.synthetic.swaps import (
    ASSERT,
    ASSIGNMENT,
    EQUAL_TO,
    LETTERS,
    MARKS,
    NEWLINE,
    SWAP,
    assignment_lines,
    draw_swaps,
    states_after,
    swap_lines,
    with_assertions,
)

_CHECK = 5  # tokens of `assert a == 2`
_ANSWER = 3  # place of the answer in it


class StateTracking(SampleGenerator):
    """Swaps of variables, with assertions at fixed gaps and one after the last swap."""

    task: Literal["state_tracking"] = "state_tracking"
    variables: int = Field(5, ge=2, le=len(LETTERS))
    """Number of variables, which hold different values."""
    gap: PositiveInt | None = 4
    """Swaps between assertions. None: only the last one."""
    strict_share: float = Field(0.0, ge=0, le=1)
    """Share of the samples that have only the last assertion."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*MARKS, *LETTERS[: self.variables], *map(str, range(self.variables)))

    def length(self, size: int) -> int:
        return self.variables * ASSIGNMENT + size * SWAP + len(self._checked(size, self.gap)) * _CHECK - 1

    def generate(self, size: int, random: np.random.Generator) -> GeneratedTokens:
        names = len(MARKS) + np.arange(self.variables)
        numbers = names + self.variables
        values, swaps = random.permutation(self.variables), draw_swaps(random, self.variables, size)
        is_strict = random.random() < self.strict_share
        checked = self._checked(size, None if is_strict else self.gap)
        asked = random.integers(0, self.variables, len(checked))

        def check(number: int, count: int, state: list[int]) -> np.ndarray:
            variable = asked[number]
            return np.array([ASSERT, names[variable], EQUAL_TO, numbers[state[variable]], NEWLINE])

        before, states = [assignment_lines(names, numbers[values])], states_after(values, swaps)
        return with_assertions(before, swap_lines(names, swaps), states, {*checked}, check, _ANSWER)

    @staticmethod
    def _checked(size: int, gap: int | None) -> list[int]:
        """Return the numbers of swaps after which there is an assertion."""
        return [*range(gap, size, gap), size] if gap else [size]


register(StateTracking)
