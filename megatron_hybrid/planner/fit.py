"""Least squares over a handful of measured points. Rates must not be negative, and each point counts by its relative error.

Plain Python, so that predictions do not depend on an installed BLAS.
"""

import math
from collections.abc import Sequence
from itertools import combinations

PIVOT_TOLERANCE = 1e-12
EQUAL_ERRORS = 1e-6
"""Relative difference of two sums of squared errors that rounding explains."""
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


def fit_nonnegative(
    columns: Sequence[Sequence[float]], times: Sequence[float], least: Sequence[float] = ()
) -> list[float]:
    """Return coefficients for which sum(coefficient * column) has the least squared relative errors against `times`.

    Solves for every subset of the terms: there are at most three of them. Of subsets that fit equally well it takes the first of the
    smallest, since the points do not determine the others. Rounding would choose between them, and they extrapolate differently.

    Args:
        columns: one sequence per term, as long as `times`.
        least: least value of each coefficient; by default, 0.
    """
    least = least or [0.0] * len(columns)
    right = [1 - sum(c * x for c, x in zip(least, point)) / time for point, time in zip(zip(*columns), times)]
    scaled = [[value / time for value, time in zip(column, times)] for column in columns]
    size = [max(map(abs, column)) or 1.0 for column in scaled]
    scaled = [[value / s for value in column] for column, s in zip(scaled, size)]
    fits = [
        _fit_terms(scaled, right, terms)
        for n in range(len(columns) + 1)
        for terms in combinations(range(len(columns)), n)
    ]
    errors = [(_squared_errors(scaled, right, fit), fit) for fit in fits if min(fit, default=0.0) >= 0]
    enough = min(error for error, _ in errors) * (1 + EQUAL_ERRORS) + EQUAL_ERRORS**2
    best = next(fit for error, fit in errors if error <= enough)  # subsets come in order of their size
    return [low + value / s for low, value, s in zip(least, best, size)]


def _fit_terms(columns: Sequence[Sequence[float]], right: Sequence[float], terms: Sequence[int]) -> list[float]:
    """Return the coefficients of least squares against `right` if only these terms are not zero."""
    normal = [[_dot(columns[i], columns[j]) for j in terms] for i in terms]
    found = dict(zip(terms, solve(normal, [_dot(columns[i], right) for i in terms])))
    return [found.get(i, 0.0) for i in range(len(columns))]


def _squared_errors(columns: Sequence[Sequence[float]], right: Sequence[float], coefficients: Sequence[float]) -> float:
    errors = [_dot(coefficients, point) - y for point, y in zip(zip(*columns), right)]
    return math.fsum(error * error for error in errors)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b))


def fit_near_one(
    columns: Sequence[Sequence[float]], targets: Sequence[float], scales: Sequence[float], strength: float
) -> list[float]:
    """Return factors of the columns that minimize squared errors against `targets` plus strength * (factor - 1)^2.

    Factors that the targets do not determine stay near 1.

    Args:
        scales: errors are relative to these, one per target.
    """
    scaled = [[value / scale for value, scale in zip(column, scales)] for column in columns]
    right = [target / scale for target, scale in zip(targets, scales)]
    n = len(columns)
    normal = [[_dot(scaled[i], scaled[j]) + strength * (i == j) for j in range(n)] for i in range(n)]
    found = solve(normal, [_dot(column, right) + strength for column in scaled])
    return [min(max(factor, SMALLEST_FACTOR), LARGEST_FACTOR) for factor in found]
