"""Least squares over a handful of measured points, without numpy: rates must not be negative, and each point counts by its
relative error."""

from collections.abc import Sequence


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """x of matrix x = right, by elimination with pivoting. Singular: the free unknowns are zero."""
    rows = [[*map(float, row), float(y)] for row, y in zip(matrix, right, strict=True)]
    n, used = len(rows), []
    for column in range(n):
        pivot = max((i for i in range(n) if i not in used), key=lambda i: abs(rows[i][column]))
        if abs(rows[pivot][column]) < 1e-12 * (1 + max(abs(v) for row in rows for v in row[:n])):
            used.append(-1 - column)
            continue
        used.append(pivot)
        for i in range(n):
            if i != pivot:
                factor = rows[i][column] / rows[pivot][column]
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[pivot])]
    return [rows[i][n] / rows[i][column] if i >= 0 else 0.0 for column, i in enumerate(used)]


def nonnegative(columns: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Coefficients >= 0 that make sum(coefficient * column) the times, with the least sum of squared relative errors.

    Args:
        columns: one sequence a term, as long as `times`.
    """
    scaled = [[value / time for value, time in zip(column, times)] for column in columns]
    size = [max(map(abs, column)) or 1.0 for column in scaled]
    scaled = [[value / s for value in column] for column, s in zip(scaled, size)]
    active = list(range(len(columns)))
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


def towards_one(columns: Sequence[Sequence[float]], times: Sequence[float], strength: float) -> list[float]:
    """Factors, near 1 where the times do not say otherwise: the relative errors' squares plus strength * (factor - 1)^2."""
    scaled = [[value / time for value, time in zip(column, times)] for column in columns]
    n = len(columns)
    normal = [
        [sum(a * b for a, b in zip(scaled[i], scaled[j])) + strength * (i == j) for j in range(n)] for i in range(n)
    ]
    found = solve(normal, [sum(column) + strength for column in scaled])
    return [min(max(factor, 0.5), 2.0) for factor in found]
