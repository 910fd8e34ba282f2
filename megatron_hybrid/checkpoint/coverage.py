"""Check that the stored slices of a tensor cover it exactly: every element once."""

from bisect import bisect_left, insort
from collections.abc import Iterable
from heapq import heappop, heappush
from math import prod

from megatron_hybrid.arch.tensor_slice import TensorSlice

Rectangle = tuple[int, int, int, int]
"""First row, row past the last, first column, column past the last."""


def coverage_problem(shape: tuple[int, ...], parts: Iterable[TensorSlice]) -> str | None:
    """Return in which way the parts fail to cover a tensor exactly; None: they cover it.

    Args:
        parts: slices inside the tensor.
    """
    rectangles = []
    for part in parts:
        if part.shape[2:] != shape[2:]:
            return f"the slice at {part.offset} of shape {part.shape} is split along dimension 2 or later"
        rectangles.append(_rectangle(part))
    held, total = sum((last - first) * (end - begin) for first, last, begin, end in rectangles), prod(shape)
    if held != total:
        return f"holds {held} values of {total}"
    overlap = _find_overlap(rectangles)
    return f"has two slices that overlap, at row {overlap[0]}, column {overlap[2]}" if overlap else None


def _rectangle(part: TensorSlice) -> Rectangle:
    """Return the rows and columns of a slice; dimensions after the first are flattened."""
    (row, column), (rows, columns) = (*part.offset, 0, 0)[:2], (*part.shape, 1, 1)[:2]
    inner = prod(part.shape[2:])
    return row, row + rows, column * inner, (column + columns) * inner


def _find_overlap(rectangles: list[Rectangle]) -> Rectangle | None:
    """Return a rectangle that overlaps one before it. A sweep over rows, in n log n steps."""
    active: list[tuple[int, int]] = []  # disjoint columns [begin, end) in the current row, sorted
    ending: list[tuple[int, int, int]] = []  # the same with the row past the last, as a heap
    for rectangle in sorted(rectangles):
        first, last, begin, end = rectangle
        while ending and ending[0][0] <= first:
            columns = heappop(ending)[1:]
            del active[bisect_left(active, columns)]
        place = bisect_left(active, (begin, begin))
        if place < len(active) and active[place][0] < end or place and active[place - 1][1] > begin:
            return rectangle
        insort(active, (begin, end))
        heappush(ending, (last, begin, end))
    return None
