"""Programs that swap variables: shared by the tasks that track state."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

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


def with_assertions(
    before: Sequence[np.ndarray],
    lines: np.ndarray,
    states: Iterable[list[int]],
    checked: Collection[int],
    check_line: Callable[[int, int, list[int]], np.ndarray],
    answer_offset: int,
) -> GeneratedTokens:
    """Return the text of swaps with assertions among them.

    Args:
        before: parts of the text before the swaps.
        lines: tokens of each swap: [swaps, SWAP].
        states: values of all variables after each swap.
        checked: numbers of swaps after which there is an assertion. The last swap is one of them.
        check_line: from the number of the assertion, of swaps before it, and the state, to its tokens.
        answer_offset: place of the answer in an assertion.
    """
    parts, answers, done = [*before], list[int](), 0
    for count, state in enumerate(states, 1):
        if count in checked:
            parts += [lines[done:count], check_line(len(answers), count, state)]
            answers.append(len(parts) - 1)
            done = count
    return join_lines(parts, answer_offset, answers)


def join_lines(parts: list[np.ndarray], answer_offset: int, answer_parts: list[int]) -> GeneratedTokens:
    """Return the text of parts in order, without the last newline.

    Args:
        answer_offset: place of the answer in a part that has one.
        answer_parts: numbers of the parts that have an answer.
    """
    flat = [part.reshape(-1) for part in parts]
    starts = np.cumsum([0, *(len(part) for part in flat)])
    return GeneratedTokens(np.concatenate(flat)[:-1], [int(starts[number]) + answer_offset for number in answer_parts])
