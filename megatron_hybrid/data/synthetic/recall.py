"""Recall: one bit of an array of `size` random bits, by its index.

bits = 0b0 0b1 0b1 0b0 ...
assert bits[17] == 0b1
"""

from typing import Literal

import numpy as np
from pydantic import PositiveInt

from megatron_hybrid.config.generators import GeneratedTokens, SampleGenerator, register
from megatron_hybrid.data.synthetic.swaps import ASSERT, EQUAL_TO, EQUALS, MARKS, NEWLINE, join_lines

WORDS = (*MARKS, "bits", "[", "]", "0b0", "0b1")
BITS, OPEN, CLOSE, ZERO = range(len(MARKS), len(MARKS) + 4)
"""Ids of `bits`, the brackets and the bit 0. The bit 1 follows."""
INDEX = len(WORDS)
"""Id of the first index."""
HEAD, CHECK, ANSWER = 3, 8, 6
"""Tokens around the bits, tokens of an assertion, and the place of the answer in it."""


def array_line(bits: np.ndarray) -> np.ndarray:
    """Return the tokens of `bits = 0b0 0b1 ...`."""
    return np.concatenate(([BITS, EQUALS], ZERO + bits, [NEWLINE]))


def check_line(index: int, bit: int) -> np.ndarray:
    """Return the tokens of `assert bits[17] == 0b1`.

    Args:
        index: id of the token in the brackets.
    """
    return np.array([ASSERT, BITS, OPEN, index, CLOSE, EQUAL_TO, ZERO + bit, NEWLINE])


class Recall(SampleGenerator):
    """An array of bits, and assertions about single bits at random places."""

    task: Literal["recall"] = "recall"
    indexes: PositiveInt = 128
    """Indexes in the vocabulary: the largest size."""
    questions: PositiveInt = 1
    """Assertions of a sample."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*WORDS, *map(str, range(self.indexes)))

    def size_problem(self, size: int) -> str | None:
        return None if size <= self.indexes else f"exceeds indexes = {self.indexes}; give at most {self.indexes}"

    def length(self, size: int) -> int:
        return HEAD + size + self.questions * CHECK - 1

    def generate(self, size: int, random: np.random.Generator) -> GeneratedTokens:
        bits, places = random.integers(0, 2, size), random.integers(0, size, self.questions).tolist()
        checks = [check_line(INDEX + place, int(bits[place])) for place in places]
        return join_lines([array_line(bits), *checks], ANSWER, [*range(1, self.questions + 1)])


register(Recall)
