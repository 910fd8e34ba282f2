"""State-based recall: the bit at the index that a variable holds after `size` swaps, in an array of `size` bits.

    bits = 0b0 0b1 0b1 0b0 ...
    a = 17
    b = 3
    ...
    a, c = c, a
    assert bits[c] == 0b1

The index follows from the swaps (state tracking), and the bit from the index (recall).
"""

from typing import Literal, Self

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.generators import GeneratedTokens, SampleGenerator, register
from megatron_hybrid.data.synthetic.recall import ANSWER, CHECK, HEAD, INDEX, WORDS, array_line, check_line
from megatron_hybrid.data.synthetic.swaps import (
    ASSIGNMENT,
    LETTERS,
    SWAP,
    assignment_lines,
    draw_swaps,
    states_after,
    swap_lines,
    with_assertions,
)


class StateBasedRecall(SampleGenerator):
    """Swaps of variables that hold indexes of an array, with assertions at random gaps and one after the last swap."""

    task: Literal["state_based_recall"] = "state_based_recall"
    indexes: PositiveInt = 128
    """Indexes in the vocabulary: the largest size."""
    variables: int = Field(5, ge=2, le=len(LETTERS))
    """Number of variables, which hold different indexes."""
    gaps: tuple[PositiveInt, PositiveInt] = Field((4, 16), strict=False)
    """Fewest and most swaps between assertions."""
    strict_share: float = Field(0.2, ge=0, le=1)
    """Share of the samples that have only the last assertion."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gaps[0] > self.gaps[1]:
            raise ConfigError.at("gaps", f"{list(self.gaps)} must ascend; give {list(self.gaps[::-1])}")
        return self

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*WORDS, *map(str, range(self.indexes)), *LETTERS[: self.variables])

    def size_problem(self, size: int) -> str | None:
        if size > self.indexes:
            return f"exceeds indexes = {self.indexes}; give at most {self.indexes}"
        if size < self.variables:
            return f"has fewer indexes than variables = {self.variables}; give at least {self.variables}"
        return None

    def length(self, size: int) -> int:
        checks = -(-size // self.gaps[0]) if self.strict_share < 1 else 1
        return HEAD + size + self.variables * ASSIGNMENT + size * SWAP + checks * CHECK - 1

    def generate(self, size: int, random: np.random.Generator) -> GeneratedTokens:
        names = INDEX + self.indexes + np.arange(self.variables)
        bits, values = random.integers(0, 2, size), random.permutation(size)[: self.variables]
        swaps, checked = draw_swaps(random, self.variables, size), self._checked(size, random)
        asked = random.integers(0, self.variables, size)

        def check(number: int, count: int, state: list[int]) -> np.ndarray:
            variable = asked[count - 1]
            return check_line(names[variable], int(bits[state[variable]]))

        before, states = [array_line(bits), assignment_lines(names, INDEX + values)], states_after(values, swaps)
        return with_assertions(before, swap_lines(names, swaps), states, checked, check, ANSWER)

    def _checked(self, size: int, random: np.random.Generator) -> set[int]:
        """Return the numbers of swaps after which there is an assertion."""
        if random.random() < self.strict_share:
            return {size}
        places = np.cumsum(random.integers(self.gaps[0], self.gaps[1] + 1, size)).tolist()
        return {*(place for place in places if place < size), size}


register(StateBasedRecall)
