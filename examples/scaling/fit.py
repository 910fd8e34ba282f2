"""Fit the scaling law of each architecture to the points of a ladder, and write a result file and a figure.

Loss is the mean over the validation sets. Constants have 95% bootstrap intervals. The token saving of an architecture at a size is the
ratio of the tokens that the transformer and it need for one loss: the transformer's after 20 tokens per parameter. Draws of the
bootstrap are shared by the architectures, so savings compare the same sizes and budgets. Savings that are interpolated between the
endpoints of a size need no law. --min-budget leaves early endpoints out of the laws.
"""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(HERE)]

from fitting import RESAMPLES, SEED, Fit, Points, bootstrap, fit, interval  # noqa: E402
from interpolation import interpolated_saving, saving_at_loss  # noqa: E402
from law import CHINCHILLA, PAPER, PAPER_FIXED, PAPER_OPTIMAL, PAPER_SAVINGS, Law, token_savings  # noqa: E402
from origins import Origin, read_origins  # noqa: E402
from points import Point, read_points  # noqa: E402
from shapes import ARCHITECTURES  # noqa: E402

from megatron_hybrid.base.errors import UserError, no_traceback  # noqa: E402
from megatron_hybrid.base.numbers import positive  # noqa: E402
from megatron_hybrid.config.command_line import CommandLine  # noqa: E402

CONSTANTS = ("E", "A", "alpha", "B", "beta")
FIXED = (0.22, 0.22)
"""Exponents of the paper's fit with fixed ones."""
FLOPS = (1e16, 1e17, 1e18, 1e19, 1e20)
FREE_EXPONENTS = "fitted exponents"
PAPER_NAME = "paper"


@dataclass
class Laws:
    """Laws of one kind, `fitted exponents` or fixed ones, by architecture."""

    kind: str
    exponents: tuple[float, float] | None
    fits: dict[str, Fit] = field(default_factory=dict)
    draws: dict[str, list[Law]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def arrays(points: Iterable[Point]) -> Points:
    """Return points of one architecture as arrays."""
    columns = zip(*((point.parameters, point.tokens, point.loss) for point in points), strict=True)
    return Points(*(np.array(column, float) for column in columns))


def fit_all(points: Sequence[Point], exponents: tuple[float, float] | None, resamples: int) -> Laws:
    """Fit the law of each architecture that has enough points. Others are named in the notes."""
    kind = FREE_EXPONENTS if exponents is None else "alpha = {:g}, beta = {:g}".format(*exponents)
    laws = Laws(kind, exponents)
    for architecture in ARCHITECTURES:
        own = [point for point in points if point.architecture == architecture]
        try:
            if not own:
                raise ValueError("there are no points")
            found = arrays(own)
            laws.fits[architecture] = fit(found, exponents)
            laws.draws[architecture] = bootstrap(found, exponents, resamples)
        except ValueError as error:
            laws.notes.append(f"no fit of the {architecture} with {kind}: {error}")
            continue
        residual = np.abs(laws.fits[architecture].residuals(found))
        one = laws.fits[architecture]
        laws.notes.append(
            f"fit of the {architecture} with {kind}: {len(own)} points, residuals of log L up to {residual.max():.2%}, "
            f"the same minimum from {one.agreeing} of {one.starts} starts"
        )
    return laws


def point_rows(points: Iterable[Point]) -> Iterator[dict]:
    """Yield the rows of the points."""
    for point in points:
        yield figure(point.case, "parameters", "", point.parameters)
        yield figure(point.case, "tokens", "", point.tokens)
        yield figure(point.case, "training", "FLOPs", point.flops)
        yield figure(point.case, "epochs", "", point.epochs)
        yield figure(point.case, "loss", "nats per token", point.loss)
        yield figure(point.case, "bits per byte", "", point.mean_bits_per_byte)
        for name, loss in point.losses.items():
            yield figure(point.case, f"loss on {name}", "nats per token", loss)


def law_rows(laws: Laws) -> Iterator[dict]:
    """Yield constants and compute-optimal losses, with intervals and the paper's values."""
    for architecture, found in laws.fits.items():
        case, draws = f"{architecture}, {laws.kind}", laws.draws[architecture]
        for name in CONSTANTS:
            if laws.exponents is not None and name in ("alpha", "beta"):
                continue
            values, paper = [getattr(law, name) for law in draws], _paper_constant(laws, architecture, name)
            yield from with_interval(case, name, "", getattr(found.law, name), values, paper)
        for flops in FLOPS if laws.exponents is None else ():
            values = [law.compute_optimal(flops)[2] for law in draws]
            metric, paper = (
                f"compute-optimal loss at 1e{round(math.log10(flops))} FLOPs",
                PAPER_OPTIMAL[architecture].get(flops),
            )
            value = found.law.compute_optimal(flops)[2]
            yield from with_interval(case, metric, "nats per token", value, values, paper)


def _paper_constant(laws: Laws, architecture: str, name: str) -> float | None:
    if laws.exponents is None:
        return getattr(PAPER[architecture], name)
    return PAPER_FIXED[architecture][0] if name == "B" and laws.exponents == FIXED else None


def saving_rows(laws: Laws, sizes: Iterable[float]) -> Iterator[dict]:
    """Yield the token savings of the hybrid and of Gated DeltaNet against the transformer by size, with intervals."""
    base = ARCHITECTURES[0]
    for architecture in ARCHITECTURES[1:]:
        if base not in laws.fits or architecture not in laws.fits:
            continue
        for size in sizes:
            tokens = CHINCHILLA * size
            value = token_savings(laws.fits[base].law, laws.fits[architecture].law, size, tokens)
            pairs = zip(laws.draws[base], laws.draws[architecture], strict=True)
            values = [token_savings(one, other, size, tokens) for one, other in pairs]
            paper = PAPER_SAVINGS.get(size) if architecture == "hybrid" else None
            metric = f"token saving at N = {size:.0f}"
            yield from with_interval(f"{architecture}, {laws.kind}", metric, "x", value, values, paper)


def interpolated_rows(points: Sequence[Point]) -> Iterator[dict]:
    """Yield the savings between the endpoints of each size: of the mean loss, and of each validation set.

    Those of the mean loss are also yielded for the transformer's loss after each of its budgets.
    """
    base = ARCHITECTURES[0]
    for architecture, size in product(ARCHITECTURES[1:], dict.fromkeys(point.size for point in points)):
        pair = [[p for p in points if (p.size, p.architecture) == (size, name)] for name in (base, architecture)]
        if not all(pair):
            continue
        case = f"{architecture}, {size}, interpolated"
        yield figure(case, "parameters", "", pair[0][0].parameters)
        curves = {"mean": [[(p.tokens, p.loss) for p in own] for own in pair]}
        curves |= {name: [[(p.tokens, p.losses[name]) for p in own] for own in pair] for name in pair[0][0].losses}
        for name, both in curves.items():
            yield figure(case, f"token saving, {name}", "x", interpolated_saving(*both))
        for point in pair[0]:
            yield figure(case, f"token saving at {point.budget:g}x", "x", saving_at_loss(*curves["mean"], point.loss))


def with_interval(
    case: str, metric: str, unit: str, value: float, draws: Sequence[float], paper: float | None
) -> Iterator[dict]:
    """Yield a value, next to the paper's, and the ends of its interval."""
    yield figure(case, metric, unit, value, paper)
    for end, bound in zip(("low", "high"), interval(draws), strict=True):
        yield figure(case, f"{metric}, {end}", unit, bound)


def figure(case: str, metric: str, unit: str, value: float | None, paper: float | None = None) -> dict:
    """Return a row without a ratio: values of another corpus are no baseline."""
    from report import row

    if isinstance(value, float):
        value = float(f"{value:.7g}") if math.isfinite(value) else None
    found = {"ours": value, "peer": paper, "peer_name": None if paper is None else PAPER_NAME}
    return row(case, metric, unit, None) | found


def analyse(points: Sequence[Point], resamples: int, min_budget: float = 0.0) -> tuple[list[dict], list[str]]:
    """Return the rows and notes of a result file. The laws leave out budgets below `min_budget`."""
    rows = [*point_rows(points), *interpolated_rows(points)]
    notes = [f"{resamples} resamples, seed {SEED}, intervals of 95%"]
    smallest, largest = (pick(point.parameters for point in points) for pick in (min, max))
    inside = {float(f"{size:.2g}") for size in np.geomspace(smallest, largest, 5)}
    late = [point for point in points if point.budget >= min_budget]
    if count := len(points) - len(late):
        notes.append(f"the laws leave out {count} of {len(points)} points, whose budgets are below {min_budget:g}")
    for exponents in (None, FIXED):
        laws = fit_all(late, exponents, resamples)
        beyond = PAPER_SAVINGS.keys() if exponents is None else set[float]()
        rows += [*law_rows(laws), *saving_rows(laws, sorted(inside | beyond))]
        notes += laws.notes
    if repeats := [point.epochs for point in points if point.epochs and point.epochs > 4]:
        notes.append(
            f"{len(repeats)} of {len(points)} points have read the training data more than 4 times, up to {max(repeats):.1f}"
        )
    return rows, notes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add(
        "--runs",
        type=Path,
        default=ROOT / "runs" / "scaling",
        help="folder of the ladder's runs (default: %(default)s)",
    )
    add("--min-budget", type=float, default=0.0, help="smallest budget of the points of the laws (default: all points)")
    add("--resamples", type=positive, default=RESAMPLES, help="of the bootstrap (default: 1000)")
    add("--out", type=Path, help="folder of the result file and the figure (default: the project's)")
    arguments = parser.parse(argv)
    with no_traceback():
        if not (points := read_points(arguments.runs)):
            raise UserError(f"--runs: {arguments.runs} has no points; run ladder.py, which writes */points.json")
        try:
            origin = read_origins(path.parent for path in sorted(arguments.runs.glob("*/points.json")))
        except ValueError as error:
            raise UserError(f"--runs: {error}") from error
        write(points, origin, arguments.resamples, arguments.out, arguments.min_budget)
    return 0


def write(
    points: Sequence[Point], origin: Origin, resamples: int, out: Path | None = None, min_budget: float = 0.0
) -> None:
    """Write the result file and the figure, and print the rows of the fits."""
    import scaling_page
    from report import RESULTS
    from report import write as write_result

    rows, notes = analyse(points, resamples, min_budget)
    shown = sum(1 for _ in point_rows(points))
    commands = list(ladders(points))
    if min_budget:
        commands.append(f"python examples/scaling/fit.py --min-budget {min_budget:g}")
    settings = dict(notes=notes, printed=shown, command=" && ".join(commands), origin=origin)
    path = write_result("scaling", rows, out=out or RESULTS, **settings)
    scaling_page.draw(json.loads(path.read_text()), out or scaling_page.PAGE)


def ladders(points: Iterable[Point]) -> Iterator[str]:
    """Yield the commands that train the points: one for the sizes of equal budgets."""
    budgets: dict[str, set[float]] = {}
    for point in sorted(points, key=lambda point: point.parameters):
        budgets.setdefault(point.size, set()).add(point.budget)
    for group in dict.fromkeys(tuple(sorted(own)) for own in budgets.values()):
        sizes = " ".join(size for size, own in budgets.items() if own == set(group))
        yield f"bash examples/scaling/run.sh --sizes {sizes} --budgets {' '.join(f'{budget:g}' for budget in group)}"


if __name__ == "__main__":
    sys.exit(main())
