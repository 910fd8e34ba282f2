"""Programs that swap variables: shared by the tasks that track state."""

from collections.abc import Iterator

import numpy as np

from megatron_hybrid.config.generators import GeneratedTokens

LETTERS = "abcdefghij"
"""Names of variables, and their largest number."""
MARKS = ("<pad>", "\n", "=", ",", "assert", "==")
NEWLINE, EQUALS, COMMA, ASSERT, EQUAL_TO = range(1, len(MARKS))
ASSIGNMENT, SWAP = 4, 8
"""Tokens of a line."""


def draw_swaps(random: np.random.Generator, variables: int, count: int) -> np.ndarray:
    """Return pairs of different variables: int64 [count, 2]."""
    first = random.integers(0, variables, count)
    second = (first + random.integers(1, variables, count)) % variables
    return np.stack((first, second), 1)


def assignment_lines(names: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the tokens of `a = 3` for each variable: [variables, ASSIGNMENT]."""
    lines = np.full((len(names), ASSIGNMENT), NEWLINE)
    lines[:, 0], lines[:, 1], lines[:, 2] = names, EQUALS, values
    return lines


def swap_lines(names: np.ndarray, swaps: np.ndarray) -> np.ndarray:
    """Return the tokens of `a, b = b, a` for each swap: [swaps, SWAP]."""
    lines = np.full((len(swaps), SWAP), NEWLINE)
    pairs = names[swaps]
    lines[:, 0:3:2], lines[:, 4:7:2] = pairs, pairs[:, ::-1]
    lines[:, 1] = lines[:, 5] = COMMA
    lines[:, 3] = EQUALS
    return lines


def states_after(values: np.ndarray, swaps: np.ndarray) -> Iterator[list[int]]:
    """Yield the values of all variables after each swap. The same list is yielded every time."""
    state = values.tolist()
    for i, j in swaps.tolist():
        state[i], state[j] = state[j], state[i]
        yield state


def join_lines(parts: list[np.ndarray], answer_offset: int, answer_parts: list[int]) -> GeneratedTokens:
    """Return the text of parts in order, without the last newline.

    Args:
        answer_offset: place of the answer in a part that has one.
        answer_parts: numbers of the parts that have an answer.
    """
    flat = [part.reshape(-1) for part in parts]
    starts = np.cumsum([0, *(len(part) for part in flat)])
    return GeneratedTokens(np.concatenate(flat)[:-1], [int(starts[number]) + answer_offset for number in answer_parts])
