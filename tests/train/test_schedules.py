"""Learning rates against megatron-core's scheduler, and the edges the docstring promises."""

import pytest
import torch

from megatron_hybrid.config.train import OptimizerConfig, ScheduleConfig, TrainConfig
from megatron_hybrid.train.schedules import learning_rate


def train_config(kind, steps=100, warmup=10, decay=None, ratio=0.1, lr=3e-4):
    schedule = ScheduleConfig(kind=kind, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=ratio)
    return TrainConfig(steps=steps, global_batch_size=8, optimizer=OptimizerConfig(lr=lr), schedule=schedule)


def rates(train, upto=None):
    return [learning_rate(step, train) for step in range(1, (upto or train.steps) + 1)]


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_agrees_with_megatron_core(kind, warmup, ratio):
    scheduler = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    decay = {"constant": None, "cosine": 90, "linear": 90, "wsd": 25}[kind]
    train = train_config(kind, warmup=warmup, decay=decay, ratio=ratio)
    lr = train.optimizer.lr
    theirs = scheduler.OptimizerParamScheduler(
        torch.optim.SGD([torch.zeros(1)], lr=lr),
        init_lr=0.0, max_lr=lr, min_lr=ratio * lr, lr_warmup_steps=warmup,
        lr_decay_steps=100 if kind == "wsd" else 90, lr_decay_style="WSD" if kind == "wsd" else kind,
        start_wd=0.1, end_wd=0.1, wd_incr_steps=1, wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False, wsd_decay_steps=25, lr_wsd_decay_style="linear",
    )  # fmt: skip
    for step, ours in enumerate(rates(train, upto=105), start=1):
        theirs.num_steps = step
        assert ours == pytest.approx(theirs.get_lr({}), rel=1e-12, abs=1e-18), step


def test_agrees_with_transformers_cosine():
    schedules = pytest.importorskip("transformers.optimization")
    train = train_config("cosine", steps=50, warmup=7, ratio=0.25, lr=1.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = schedules.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 7, 50, min_lr_rate=0.25)
    for ours in rates(train):
        optimizer.step()
        theirs.step()  # after n steps it holds the rate that we call step n's
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear", "wsd"])
def test_edges(kind):
    train = train_config(kind, steps=1000, warmup=100, ratio=0.1, lr=1.0)
    values = rates(train, upto=1100)
    assert values[0] == 0.01 and values[49] == 0.5 and values[99] == 1.0
    assert max(values) == 1.0
    assert values[999] == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert set(values[999:]) == {values[999]}, "a run that is continued stays at the minimum"
    falling = values[99:1000]
    assert all(a >= b for a, b in zip(falling, falling[1:]))
    if kind == "wsd":  # the last tenth falls
        assert values[899] == 1.0 and values[900] == pytest.approx(1 - 0.9 / 100)


def test_wsd_of_a_short_run_decays_in_the_last_step():
    assert rates(train_config("wsd", steps=4, warmup=0, ratio=0.5, lr=1.0)) == [1.0, 1.0, 1.0, 0.5]


def test_warmup_and_decay_that_overlap_take_the_smaller():
    values = rates(train_config("wsd", steps=20, warmup=19, ratio=0.0, lr=1.0))
    assert values == [pytest.approx(v) for v in [s / 19 for s in range(1, 19)] + [0.5, 0.0]]


def test_one_step():
    assert rates(train_config("cosine", steps=1, warmup=0)) == [pytest.approx(3e-5)]
    assert rates(train_config("constant", steps=1, warmup=0)) == [3e-4]


def test_there_is_no_step_zero():
    with pytest.raises(ValueError, match="first update is step 1"):
        learning_rate(0, train_config("cosine"))


def test_wsd_s_decays_before_each_endpoint_and_returns_to_the_peak():
    """Up to every endpoint it is what wsd is over that many steps; OLMo Hybrid's scaling law uses a decay of 5%."""
    fields = dict(warmup_steps=10, decay_fraction=0.05, min_lr_ratio=0.0)
    ladder = with_schedule(400, kind="wsd_s", endpoints=(100, 200), **fields)
    found = rates(ladder)
    for begin, end in ((10, 100), (100, 200), (200, 400)):
        alone = rates(with_schedule(end, kind="wsd", **fields))
        assert found[begin:end] == alone[begin:end]
        assert found[end - 1] == 0 and alone[end - 1] == 0
    assert found[100] == found[200] == ladder.optimizer.lr, "back to the peak"
    assert [found[end - 1 - round(end * 0.05)] for end in (100, 200, 400)] == [ladder.optimizer.lr] * 3


def test_phases():
    phases = [
        dict(steps=10, start=0.0),
        dict(steps=20),
        dict(steps=10, kind="cosine", end=0.5),
        dict(steps=60, kind="sqrt", start=0.5, end=0.0),
    ]
    found = rates(with_schedule(100, kind="phases", phases=phases), upto=120)
    lr = OptimizerConfig().lr
    warm = rates(with_schedule(100, kind="constant", warmup_steps=10))
    assert found[:30] == pytest.approx(warm[:30]) and found[9] == lr
    assert found[34] == pytest.approx(0.75 * lr) and found[39] == pytest.approx(0.5 * lr)
    assert found[54] == pytest.approx(0.25 * lr) and set(found[99:]) == {0.0}


def test_linear_to_zero():
    found = rates(with_schedule(50, kind="linear", min_lr_ratio=0.0))
    assert found == pytest.approx([OptimizerConfig().lr * (1 - step / 50) for step in range(1, 51)])


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (dict(kind="wsd", endpoints=[5]), "schedule.endpoints.*belong to kind wsd_s, and kind is wsd"),
        (dict(kind="cosine", phases=[dict(steps=9)]), "schedule.phases.*belong to kind phases"),
        (
            dict(kind="phases", phases=[dict(steps=9)]),
            "schedule.phases.*have 9 steps, and train.steps is 100; add a phase of 91",
        ),
        (dict(kind="wsd_s", endpoints=[200]), "schedule.endpoints.*200 is above train.steps = 100"),
        (
            dict(kind="wsd_s", endpoints=[50, 40]),
            "schedule.endpoints.*the decay of 4 steps before 40 begins before step 50",
        ),
        (dict(kind="wsd_s", endpoints=[50], decay_steps=60), "the decay of 60 steps before 50 begins before step 0"),
        (
            dict(kind="phases", phases=[dict(steps=100)], decay_steps=5),
            "schedule.decay_steps.*no meaning for a phases schedule",
        ),
    ],
)
def test_wrong_lists_name_the_field(fields, error):
    with pytest.raises(ValueError, match=error):
        with_schedule(100, **fields)


def with_schedule(steps, **fields):
    return TrainConfig(steps=steps, global_batch_size=8, schedule=ScheduleConfig(**fields))
