"""The fit of examples/scaling: known constants, torch's L-BFGS, coverage of intervals, and the paper's table."""

import sys

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def law(root):
    sys.path.insert(0, str(root / "examples" / "scaling"))
    try:
        import fitting
        import interpolation
        import law

        yield type("Modules", (), {**vars(law), **vars(fitting), **vars(interpolation)})
    finally:
        sys.path.pop(0)


SIZES = np.geomspace(60e6, 1e9, 7)
BUDGETS = (0.5, 1, 2, 4, 8)


def points(law, true, noise: float, seed: int):
    """35 points, as many as the paper's, whose log L has normal noise."""
    n = SIZES.repeat(len(BUDGETS))
    d = n * 20 * np.tile(BUDGETS, len(SIZES))
    errors = noise * np.random.default_rng(seed).standard_normal(len(n))
    return law.Points(n, d, true.loss(n, d) * np.exp(errors))


def relative_errors(found, true) -> dict[str, float]:
    return {name: abs(getattr(found, name) / getattr(true, name) - 1) for name in ("E", "A", "alpha", "B", "beta")}


ARCHITECTURES = ("transformer", "hybrid", "gdn")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_points_give_the_constants(law, name):
    true = law.PAPER[name]
    found = law.fit(points(law, true, 0.0, 0))
    for constant in ("E", "A", "alpha", "B", "beta"):
        assert getattr(found.law, constant) == pytest.approx(getattr(true, constant), rel=1e-6)
    assert found.agreeing == found.starts == 243


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_noise_of_a_thousandth_moves_the_constants_little(law, name):
    """Over 200 sets of points the worst errors were 6% of E, 12% of the exponents and 0.6% of the constants with fixed exponents."""
    true = law.PAPER[name]
    noisy = points(law, true, 1e-3, 1)
    found = law.fit(noisy).law
    errors = relative_errors(found, true)
    assert errors["E"] < 0.06 and errors["alpha"] < 0.12 and errors["beta"] < 0.12
    beyond = 7e9, 140e9  # seven times the largest size
    assert found.loss(*beyond) == pytest.approx(true.loss(*beyond), rel=0.01)
    fixed = law.fit(noisy, (true.alpha, true.beta)).law
    assert (fixed.alpha, fixed.beta) == pytest.approx((true.alpha, true.beta))
    assert max(relative_errors(fixed, true).values()) < 0.015


def by_torch(law, found, start) -> float:
    """Minimum of the loss by torch's HuberLoss and LBFGS, from a law."""
    first = [np.log(start.E), np.log(start.A), start.alpha, np.log(start.B), start.beta]
    x = torch.tensor(first, dtype=torch.float64, requires_grad=True)
    log_n, log_d, log_loss = (torch.from_numpy(np.log(column)) for column in found)
    huber = torch.nn.HuberLoss(reduction="sum", delta=law.DELTA)
    options = dict(max_iter=5000, max_eval=20000, tolerance_grad=1e-12, tolerance_change=1e-15, history_size=50)
    optimizer = torch.optim.LBFGS([x], line_search_fn="strong_wolfe", **options)

    def closure():
        optimizer.zero_grad()
        e, a, alpha, b, beta = x
        terms = torch.stack([e.expand_as(log_n), a - alpha * log_n, b - beta * log_d])
        value = huber(torch.logsumexp(terms, 0), log_loss) / law.DELTA**2
        value.backward()
        return value

    for _ in range(5):
        value = optimizer.step(closure)
    return value.item()


@pytest.mark.parametrize("noise", [1e-3, 5e-3], ids=["mostly quadratic", "mostly linear"])
def test_torch_finds_no_lower_minimum(law, noise):
    true = law.PAPER["hybrid"]
    noisy = points(law, true, noise, 3)
    ours = law.fit(noisy)
    assert ours.objective <= by_torch(law, noisy, true) * (1 + 1e-6)
    from_ours = by_torch(law, noisy, ours.law)  # torch measures the same loss there, and cannot leave it
    assert from_ours == pytest.approx(ours.objective, rel=1e-6)


@pytest.mark.slow
def test_intervals_cover_the_truth_at_about_their_rate(law):
    """At least 34 of 40 intervals of 95%, for 38 expected with a deviation of 1.4. The exponents are the paper's fixed ones."""
    true = law.Law(1.6, 71.14, 0.22, 83.65, 0.22)
    covered = {"E": 0, "A": 0, "B": 0}
    for seed in range(40):
        draws = law.bootstrap(points(law, true, 1e-3, 100 + seed), (0.22, 0.22), resamples=150, seed=seed)
        for name in covered:
            low, high = law.interval([getattr(draw, name) for draw in draws])
            covered[name] += low <= getattr(true, name) <= high
    assert all(34 <= count <= 40 for count in covered.values()), covered
    assert sum(covered.values()) < 3 * 40, "intervals that never miss are too wide"


def test_the_bootstrap_is_seeded_and_shared_by_equal_designs(law):
    one, other = (points(law, law.PAPER[name], 0.0, 0) for name in ("hybrid", "transformer"))
    noise = 1e-2 * np.random.default_rng(5).standard_normal(35)
    one, other = (p._replace(loss=p.loss * np.exp(noise)) for p in (one, other))
    first, again = (law.bootstrap(one, (0.226, 0.219), 20, seed=7) for _ in range(2))
    assert first == again and first != law.bootstrap(one, (0.226, 0.219), 20, seed=8)
    others = law.bootstrap(other, (0.252, 0.213), 20, seed=7)
    errors = [[draw.loss(1e9, 2e10) for draw in draws] for draws in (first, others)]
    assert np.corrcoef(errors)[0, 1] > 0.95, "a common error cancels in their ratio"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_papers_constants_give_its_compute_optimal_losses(law, name):
    """The constants have three digits, so the losses differ by up to 0.011 from those that the paper prints."""
    for flops, printed in law.PAPER_OPTIMAL[name].items():
        parameters, tokens, loss = law.PAPER[name].compute_optimal(flops)
        assert loss == pytest.approx(printed, abs=0.012)
        sizes = parameters * np.geomspace(0.5, 2, 1001)
        losses = law.PAPER[name].loss(sizes, flops / 6 / sizes)
        assert 6 * parameters * tokens == pytest.approx(flops) and losses.min() >= loss - 1e-12
        assert sizes[losses.argmin()] == pytest.approx(parameters, rel=0.01)


def test_the_papers_constants_do_not_give_its_savings(law):
    """The paper prints 1.32, 1.68 and 1.89. Its constants give more at 20 tokens per parameter, and at most other budgets.

    Only at 1B is there a budget, 5 to 6 trillion tokens, for which they give 1.32. A small error of E or A moves the savings a lot.
    """
    base, hybrid = law.PAPER["transformer"], law.PAPER["hybrid"]
    found = {size: law.token_savings(base, hybrid, size, 20 * size) for size in law.PAPER_SAVINGS}
    assert found == pytest.approx({1e9: 1.760, 7e9: 1.843, 70e9: 2.339}, abs=2e-3)
    for size, saving in found.items():
        tokens = np.geomspace(size, 40 * size, 100_001)
        numeric = np.interp(-base.loss(size, 20 * size), -hybrid.loss(size, tokens), tokens)
        assert 20 * size / numeric == pytest.approx(saving, rel=1e-4)
    budgets = np.geomspace(1, 1e4, 400)
    by_budget = {size: [law.token_savings(base, hybrid, size, size * b) for b in budgets] for size in found}
    assert min(by_budget[70e9]) > 2.1 and min(by_budget[1e9]) < 1.32


def test_savings_between_endpoints(law):
    """The second model has the first one's last loss, 3.0, a quarter of the way (in log tokens) from 100 to 200 tokens."""
    base, other = [(100, 4.0), (200, 3.5), (400, 3.0)], [(100, 3.1), (200, 2.7), (400, 2.5)]
    assert law.interpolated_saving(base, other) == pytest.approx(400 / (100 * 2**0.25))
    assert law.interpolated_saving(other, base) == pytest.approx((100 * 2**0.25) / 400), "the same loss, the other way"
    assert law.interpolated_saving(base, base) == 1
    assert law.saving_at_loss(base, other, 3.05) == pytest.approx(2**1.9 / 2**0.125), (
        "a higher loss, which both had earlier"
    )
    assert law.saving_at_loss(base, other, 2.8) is None, "the first never has it"
    assert law.interpolated_saving(base, [(100, 2.9), (400, 2.0)]) is None, "it is never that bad"
    assert law.interpolated_saving([(100, 2.9), (400, 2.0)], base) is None
    assert law.tokens_at_loss(base, 2.9) is None and law.tokens_at_loss(base, 3.5) == pytest.approx(200)


@pytest.mark.parametrize("name", ["hybrid", "gdn"])
def test_savings_between_endpoints_agree_with_the_law(law, name):
    size = 1e9
    tokens = [int(20 * size * budget) for budget in np.geomspace(0.05, 1, 200)]
    base, other = ([(d, float(law.PAPER[key].loss(size, d))) for d in tokens] for key in ("transformer", name))
    expected = law.token_savings(law.PAPER["transformer"], law.PAPER[name], size, 20 * size)
    assert law.interpolated_saving(base, other) == pytest.approx(expected, rel=1e-3)


def test_a_loss_that_is_never_reached(law):
    true = law.PAPER["hybrid"]
    assert true.tokens_for(1e9, true.E) == np.inf
    assert law.token_savings(law.Law(1.0, 1.0, 0.2, 1.0, 0.2), true, 1e9, 2e10) == 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (dict(count=4), "4 points cannot determine 5 constants"),
        (dict(parameters=1e8), "all points have one size"),
        (dict(tokens=1e9), "all points have one number of tokens"),
    ],
)
def test_points_that_determine_no_law(law, change, error):
    found = points(law, law.PAPER["gdn"], 0.0, 0)
    if "count" in change:
        found = law.Points(*(column[: change["count"]] for column in found))
    else:
        found = found._replace(**{name: np.full(35, value) for name, value in change.items()})
    with pytest.raises(ValueError, match=error):
        law.fit(found)
