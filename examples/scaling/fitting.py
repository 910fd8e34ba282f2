"""Fit of a scaling law: Huber loss on the residuals of log L, a grid of starts, and bootstrap intervals.

- `fit`: the law of a set of points.
- `bootstrap`: laws of resampled points, from which `interval` takes quantiles.
- `minimize`: BFGS on a batch of small problems at once. With five unknowns it keeps the whole matrix that L-BFGS approximates.

Shapes: s problems, p points, 5 unknowns (log E, log A', u, log B', v). A' and B' are the terms A / N^alpha and B / D^beta at the
geometric means of N and D, which are less correlated with the exponents than A and B. The exponents are 2 sigmoid(u) and
2 sigmoid(v), so they stay between 0 and 2.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from law import Law

DELTA = 1e-3
"""Residual of log L from which the Huber loss is linear."""
RESAMPLES = 1000
SEED = 0
_STARTS = {"floor": (0.3, 0.6, 0.9), "term": (0.03, 0.12, 0.4), "exponent": (0.1, 0.25, 0.5)}
"""Starts of E as a share of the lowest loss, of A' and B' as shares of the mean loss, and of both exponents."""
LARGEST_EXPONENT = 2.0
_MOST_STEPS, _MOST_HALVINGS = 400, 40

Array = np.ndarray
Objective = Callable[[Array, Array], tuple[Array, Array]]
"""Values [s] and gradients [s, 5] of the unknowns [s, 5] of the problems with the given numbers [s]."""


class Points(NamedTuple):
    """Points of one architecture, each array [p]."""

    parameters: Array
    """Without embeddings and output layer."""
    tokens: Array
    loss: Array
    """Nats per token."""


@dataclass(frozen=True)
class Fit:
    """A fitted law."""

    law: Law
    objective: float
    """Sum of the Huber losses, divided by DELTA squared."""
    agreeing: int
    """Starts that reached the same minimum, to 1% of the objective."""
    starts: int

    def residuals(self, points: Points) -> Array:
        """Return log(fitted / measured) of each point."""
        return np.log(self.law.loss(points.parameters, points.tokens) / points.loss)


def fit(points: Points, exponents: tuple[float, float] | None = None) -> Fit:
    """Return the law with the lowest Huber loss over a grid of starts.

    Args:
        exponents: alpha and beta if they are fixed; None: they are fitted.

    Raises:
        ValueError: fewer points than unknowns, or points of one size or budget only.
    """
    _check(points, 5 if exponents is None else 3)
    starts = _starts(points, exponents)
    weights = np.ones((len(starts), len(points.loss)))
    found, values = _minimize_points(points, weights, starts, exponents)
    best = int(np.argmin(values))
    agreeing = int((values <= values[best] * 1.01 + 1e-9).sum())
    return Fit(_law(found[best], points), float(values[best]), agreeing, len(starts))


def bootstrap(
    points: Points, exponents: tuple[float, float] | None = None, resamples: int = RESAMPLES, seed: int = SEED
) -> list[Law]:
    """Return the laws of points drawn with replacement.

    Equal seeds draw the same places of equally long sets. Architectures with the same sizes and budgets are thus resampled together.
    Draws without two sizes and two budgets are drawn again.

    Raises:
        ValueError: as `fit`.
    """
    _check(points, 5 if exponents is None else 3)
    random = np.random.default_rng(seed)
    weights = np.stack([_draw(points, random) for _ in range(resamples)])
    grid = _starts(points, exponents)
    solutions, values = _minimize_points(points, np.ones((len(grid), len(points.loss))), grid, exponents)
    others = grid[:: max(1, len(grid) // 3)][:3]  # in case a draw has its minimum elsewhere
    starts = np.concatenate([solutions[[values.argmin()]], others])
    tiled = np.tile(starts, (resamples, 1))
    solutions, values = _minimize_points(points, np.repeat(weights, len(starts), 0), tiled, exponents)
    best = values.reshape(resamples, -1).argmin(1) + np.arange(resamples) * len(starts)
    return [_law(solution, points) for solution in solutions[best]]


def interval(values: Sequence[float], coverage: float = 0.95) -> tuple[float, float]:
    """Return the quantiles that leave out equal shares at both ends."""
    low, high = np.quantile(np.asarray(values, float), [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)


def minimize(objective: Objective, starts: Array, most_steps: int = _MOST_STEPS) -> tuple[Array, Array]:
    """Minimize a batch of problems by BFGS with backtracking, each from its own start.

    Args:
        starts: [s, 5].

    Returns:
        Unknowns [s, 5] and values [s].
    """
    x, numbers = starts.copy(), np.arange(len(starts))
    value, gradient = objective(x, numbers)
    inverse = np.tile(np.eye(x.shape[1]), (len(x), 1, 1)) / np.maximum(1.0, np.abs(gradient).max(1))[:, None, None]
    active = numbers
    for _ in range(most_steps):
        g, h = gradient[active], inverse[active]
        direction = -np.einsum("sij,sj->si", h, g)
        slope = (direction * g).sum(1)
        new_x, new_value, new_gradient, moved = _line_search(
            objective, active, x[active], value[active], gradient[active], direction, slope
        )
        s, y = new_x - x[active], new_gradient - g
        inverse[active] = _updated(h, s, y)
        gained = value[active] - new_value
        x[active], value[active], gradient[active] = new_x, new_value, new_gradient
        active = active[moved & (gained > 1e-12 * (np.abs(new_value) + 1e-12))]
        if not len(active):
            break
    return x, value


def _line_search(
    objective: Objective, numbers: Array, x: Array, value: Array, gradient: Array, direction: Array, slope: Array
) -> tuple[Array, Array, Array, Array]:
    """Return the first points of halved steps that satisfy Armijo's condition, and where there is one."""
    new_x, new_value, new_gradient = x.copy(), value.copy(), gradient.copy()
    longest = np.abs(direction).max(1)
    step = np.minimum(1.0, 1.0 / np.maximum(longest, 1e-300))  # at most 1 in any logarithm or exponent
    left = np.flatnonzero(slope < 0)
    moved = np.zeros(len(x), bool)
    for _ in range(_MOST_HALVINGS):
        tried = x[left] + step[left, None] * direction[left]
        found, slopes = objective(tried, numbers[left])
        good = found <= value[left] + 1e-4 * step[left] * slope[left]
        done = left[good]
        new_x[done], new_value[done], new_gradient[done] = tried[good], found[good], slopes[good]
        moved[done] = True
        left = left[~good]
        if not len(left):
            break
        step[left] /= 2
    return new_x, new_value, new_gradient, moved


def _updated(inverse: Array, s: Array, y: Array) -> Array:
    """Return BFGS's next inverse Hessians. Those without positive curvature stay."""
    curvature = (s * y).sum(1)
    good = curvature > 1e-14 * np.sqrt((s**2).sum(1) * (y**2).sum(1))
    rho = np.where(good, 1 / np.where(good, curvature, 1.0), 0.0)[:, None, None]
    left = np.eye(s.shape[1]) - rho * s[:, :, None] * y[:, None, :]
    return np.where(
        good[:, None, None], left @ inverse @ left.transpose(0, 2, 1) + rho * s[:, :, None] * s[:, None, :], inverse
    )


def _minimize_points(
    points: Points, weights: Array, starts: Array, exponents: tuple[float, float] | None
) -> tuple[Array, Array]:
    """Fit problems that weight the points differently.

    Args:
        weights: [s, p].
    """
    log_n, log_d = _centered(points)
    log_loss = np.log(points.loss)
    is_free = exponents is None

    def objective(x: Array, numbers: Array) -> tuple[Array, Array]:
        alpha, beta = (_exponent(x[:, column, None]) for column in (2, 4))
        floor = np.exp(x[:, 0, None])
        by_size = np.exp(x[:, 1, None] - alpha * log_n)
        by_tokens = np.exp(x[:, 3, None] - beta * log_d)
        fitted = floor + by_size + by_tokens
        residual = (np.log(fitted) - log_loss) / DELTA
        inside = np.abs(residual) <= 1
        huber = np.where(inside, residual**2 / 2, np.abs(residual) - 0.5)
        w = weights[numbers]
        outer = w * np.clip(residual, -1, 1) / (DELTA * fitted)
        size, tokens = outer * by_size, outer * by_tokens
        slopes = (is_free * e * (1 - e / LARGEST_EXPONENT) for e in (alpha, beta))  # of the exponents by u and v
        of_alpha, of_beta = (-term * log * e for term, log, e in zip((size, tokens), (log_n, log_d), slopes))
        parts = (outer * floor, size, of_alpha, tokens, of_beta)
        return (w * huber).sum(1), np.stack([part.sum(1) for part in parts], 1)

    return minimize(objective, starts)


def _starts(points: Points, exponents: tuple[float, float] | None) -> Array:
    floors = np.log(np.array(_STARTS["floor"]) * points.loss.min())
    terms = np.log(np.array(_STARTS["term"]) * points.loss.mean())
    alphas = betas = _STARTS["exponent"]
    if exponents is not None:
        alphas, betas = (exponents[0],), (exponents[1],)
    return np.array(list(product(floors, terms, map(_unknown, alphas), terms, map(_unknown, betas))))


def _exponent(unknown: Array) -> Array:
    return LARGEST_EXPONENT / (1 + np.exp(-np.clip(unknown, -50, 50)))


def _unknown(exponent: float) -> float:
    return float(np.log(exponent / (LARGEST_EXPONENT - exponent)))


def _centered(points: Points) -> tuple[Array, Array]:
    log_n, log_d = np.log(points.parameters), np.log(points.tokens)
    return log_n - log_n.mean(), log_d - log_d.mean()


def _law(x: Array, points: Points) -> Law:
    e, a, b = map(float, x[[0, 1, 3]])
    alpha, beta = map(float, _exponent(x[[2, 4]]))
    mean_n, mean_d = (float(np.log(v).mean()) for v in (points.parameters, points.tokens))
    return Law(*map(float, (np.exp(e), np.exp(a + alpha * mean_n), alpha, np.exp(b + beta * mean_d), beta)))


def _draw(points: Points, random: np.random.Generator) -> Array:
    """Return how often each point is drawn, [p]."""
    count = len(points.loss)
    while True:
        weights = np.bincount(random.integers(count, size=count), minlength=count)
        drawn = weights > 0
        if all(len(np.unique(values[drawn])) > 1 for values in (points.parameters, points.tokens)):
            return weights


def _check(points: Points, unknowns: int) -> None:
    count = len(points.loss)
    if count < unknowns:
        raise ValueError(f"{count} points cannot determine {unknowns} constants; add sizes or budgets")
    for name, values in (("size", points.parameters), ("number of tokens", points.tokens)):
        if len(np.unique(values)) < 2:
            raise ValueError(f"all points have one {name}; the law needs at least two")
