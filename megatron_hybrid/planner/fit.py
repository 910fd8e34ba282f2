"""Least squares over a handful of measured points. Rates must not be negative, and each point counts by its relative error.

Plain Python, so that predictions do not depend on an installed BLAS.
"""

from collections.abc import Sequence

PIVOT_TOLERANCE = 1e-12
SMALLEST_FACTOR, LARGEST_FACTOR = 0.5, 2.0


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Solve matrix x = right by elimination with pivoting. Free unknowns of a singular system are zero."""
    rows = [[*map(float, row), float(y)] for row, y in zip(matrix, right, strict=True)]
    n = len(rows)
    used: list[int] = []
    for column in range(n):
        pivot = max((i for i in range(n) if i not in used), key=lambda i: abs(rows[i][column]))
        if abs(rows[pivot][column]) < PIVOT_TOLERANCE * (1 + max(abs(v) for row in rows for v in row[:n])):
            used.append(-1 - column)
            continue
        used.append(pivot)
        for i in range(n):
            if i != pivot:
                factor = rows[i][column] / rows[pivot][column]
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[pivot])]
    return [rows[i][n] / rows[i][column] if i >= 0 else 0.0 for column, i in enumerate(used)]


def fit_nonnegative(columns: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Return coefficients >= 0 for which sum(coefficient * column) has the least squared relative errors against `times`.

    Args:
        columns: one sequence per term, as long as `times`.
    """
    scaled = [[value / time for value, time in zip(column, times)] for column in columns]
    size = [max(map(abs, column)) or 1.0 for column in scaled]
    scaled = [[value / s for value in column] for column, s in zip(scaled, size)]
    active, found = list(range(len(columns))), list[float]()
    while active:
        normal = [[sum(a * b for a, b in zip(scaled[i], scaled[j])) for j in active] for i in active]
        found = solve(normal, [sum(scaled[i]) for i in active])
        if min(found) >= 0:
            break
        active.pop(found.index(min(found)))  # the most negative term explains nothing
    result = [0.0] * len(columns)
    for i, value in zip(active, found if active else []):
        result[i] = value / size[i]
    return result


def fit_near_one(columns: Sequence[Sequence[float]], times: Sequence[float], strength: float) -> list[float]:
    """Return factors of the columns that minimize the squared relative errors plus strength * (factor - 1)^2.

    Factors that the times do not determine stay near 1.
    """
    scaled = [[value / time for value, time in zip(column, times)] for column in columns]
    n = len(columns)
    normal = [
        [sum(a * b for a, b in zip(scaled[i], scaled[j])) + strength * (i == j) for j in range(n)] for i in range(n)
    ]
    found = solve(normal, [sum(column) + strength for column in scaled])
    return [min(max(factor, SMALLEST_FACTOR), LARGEST_FACTOR) for factor in found]
