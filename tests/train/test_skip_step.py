"""Skip-step: the rule against torch's statistics, what never enters the window, and its state."""

import json
import math
import random

import pytest
import torch

from megatron_hybrid.config.train import SkipStepConfig
from megatron_hybrid.train.skip_step import SkipStep

CONFIG = SkipStepConfig(window=8, sigmas=6.0)


def filled(count=8, config=CONFIG, seed=0):
    """A judge that has seen `count` ordinary steps."""
    skip, rng = SkipStep(config), random.Random(seed)
    for _ in range(count):
        assert skip.should_skip(3 + rng.gauss(0, 0.1), 1 + rng.gauss(0, 0.05)) is None
    return skip


def olmo_core(losses, norms, window, sigmas):
    """OLMo-core 3.0.0's SkipStepOptimizer.get_step_factor on the history with the current values last."""
    losses, norms = (torch.tensor(x[-window - 1 :], dtype=torch.float64) for x in (losses, norms))
    (loss_std, loss_mean), (norm_std, norm_mean) = torch.std_mean(losses[:-1]), torch.std_mean(norms[:-1])
    return bool(losses[-1] - loss_mean <= sigmas * loss_std and norms[-1] - norm_mean <= sigmas * norm_std)


def test_agrees_with_olmo_cores_rule():
    rng, skip = random.Random(1), SkipStep(SkipStepConfig(window=32, sigmas=2.5))
    losses, norms, skipped = [], [], 0
    for step in range(400):
        losses.append(3 + rng.gauss(0, 0.2) + (rng.random() < 0.05))
        norms.append(1 + rng.gauss(0, 0.1) + (rng.random() < 0.05))
        reason = skip.should_skip(losses[-1], norms[-1])
        if step >= 16:
            assert (reason is None) == olmo_core(losses, norms, 32, 2.5), step
            skipped += reason is not None
        else:
            assert reason is None
    assert 10 < skipped < 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_always_skips_and_leaves_no_trace(bad):
    for skip in (filled(0), filled(8), filled(8, SkipStepConfig(enabled=False))):
        before = skip.state_dict()
        assert skip.should_skip(bad, 1.0) == f"loss is {bad}"
        assert skip.should_skip(3.0, bad) == f"gradient norm is {bad}"
        assert skip.state_dict() == before | {"nonfinite_steps": 2}


def test_an_outlier_is_named_and_enters_the_window():
    skip = filled()
    assert skip.should_skip(30.0, 1.0).startswith("loss 30 is above ")
    assert skip.state_dict()["losses"][-1] == 30.0 and skip.state_dict()["grad_norms"][-1] == 1.0
    assert filled().should_skip(3.0, 9.0).startswith("gradient norm 9 is above ")


def test_a_drop_is_welcome():
    assert filled().should_skip(0.0, 0.0) is None


def test_a_lasting_change_of_level_is_accepted_in_the_end():
    skip = filled()
    verdicts = [skip.should_skip(30.0, 1.0) for _ in range(8)]
    assert verdicts[0] is not None and verdicts[-1] is None


@pytest.mark.parametrize("window, needed", [(8, 4), (9, 5), (3, 2), (2, 2)])
def test_judges_after_half_a_window(window, needed):
    for count in range(needed + 1):
        skip = filled(count, SkipStepConfig(window=window))
        assert (skip.should_skip(1e6, 1.0) is not None) == (count >= needed), count


def test_equal_values_do_not_make_rounding_an_outlier():
    skip = SkipStep(CONFIG)
    for _ in range(8):
        skip.should_skip(2.5, 1.0)
    assert skip.should_skip(2.5 * (1 + 1e-7), 1.0) is None
    assert skip.should_skip(2.6, 1.0) is not None


def test_state_survives_json_and_decides_the_same():
    one = filled(5)
    other = SkipStep(CONFIG)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    rng = random.Random(3)
    for _ in range(50):
        values = (3 + rng.gauss(0, 1), 1 + abs(rng.gauss(0, 1)))
        assert one.should_skip(*values) == other.should_skip(*values)
    assert one.state_dict() == other.state_dict()
    assert all(len(one.state_dict()[name]) == 8 for name in ("losses", "grad_norms"))


def test_a_longer_window_is_cut_to_the_newest():
    skip = SkipStep(SkipStepConfig(window=3))
    skip.load_state_dict(filled(8).state_dict())
    assert skip.state_dict()["losses"] == filled(8).state_dict()["losses"][-3:]


@pytest.mark.parametrize("state", [{"losses": [1.0]}, {"losses": [math.nan], "grad_norms": [1.0]}])
def test_a_bad_state_is_refused_and_changes_nothing(state):
    skip = filled()
    before = skip.state_dict()
    with pytest.raises(ValueError, match="skip-step window"):
        skip.load_state_dict(state)
    assert skip.state_dict() == before
