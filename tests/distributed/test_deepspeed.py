"""DeepSpeed's ZeRO against megatron-core's engine: the same curve, checkpoints that go both ways, steps that are skipped."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from megatron_hybrid.convert.verify import verify
from testing import jobs
from testing.layouts import LR, SAVED, STEPS, TRAIN, assert_same, layout
from testing.layouts import MODEL as FOUR_LAYERS
from testing.zero import run, values_that_differ
from tests.convert import jobs as convert_jobs
from tests.convert.test_huggingface import to_theirs
from tests.distributed.test_same_curve import slow_unless

if find_spec("deepspeed") is None:
    pytest.skip("no DeepSpeed here: HYBRID_EXTRAS=dev,deepspeed source tools/env.sh", allow_module_level=True)

ZERO = TRAIN | {"engine": "deepspeed"}
MODEL = FOUR_LAYERS | {"layer_pattern": "GA"}


@pytest.fixture(scope="module")
def megatron(ranks, tmp_path_factory):
    """megatron-core's curve on one rank, and its checkpoint of step SAVED."""
    common = dict(model=MODEL, parallel=layout(), train=TRAIN, lr=LR)
    (first,) = ranks.run(jobs.curve, 1, steps=SAVED, save=str(tmp_path_factory.mktemp("megatron")), **common)
    (second,) = ranks.run(jobs.curve, 1, start=SAVED, steps=STEPS, load=first["path"], **common)
    curves = {what: first[what] + second[what] for what in ("losses", "norms")}
    assert curves["losses"][-1] < curves["losses"][0] - 0.01, "it learns something"
    return curves | {"path": first["path"]}


CURVES = {
    # name: (ranks, layout, zero)
    # benchmarks/zero_parity.py has all
    **{f"ZeRO {stage}, DP2": (2, layout(), {"stage": stage}) for stage in (1, 3)},
    "ZeRO 3, TP2, DP2": (4, layout(2), {"stage": 3}),
    "ZeRO 2, state in host memory": (2, layout(), {"stage": 2, "offload_optimizer": "cpu"}),
    "ZeRO 3, all in host memory": (2, layout(), {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    "ZeRO 3, one rank, full recompute": (1, layout(recompute_granularity="full"), {"stage": 3}),
    "ZeRO 1, TP2, no sequence parallelism": (2, layout(2, sequence_parallel=False), {"stage": 1}),
    "ZeRO 3, TP4, padded heads": (4, layout(4), {"stage": 3}),
}
QUICK = ("ZeRO 1, DP2", "ZeRO 3, TP2, DP2", "ZeRO 3, all in host memory")


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_unless(name in QUICK)) for name in CURVES])
def test_the_curve_is_megatron_s(name, ranks, megatron):
    count, parallel, zero = CURVES[name]
    for result in run(ranks, count, zero, parallel, model=MODEL):
        assert_same(result, megatron)
        assert result["updates"] == STEPS


def curve_in_small_groups(**arguments) -> dict:
    """jobs.curve with stage 3's state in many pieces, as that of a large model is."""
    from megatron_hybrid.train.engines.deepspeed import settings as zero_settings

    zero_settings.SUB_GROUP = 5_000
    return jobs.curve(**arguments)


@pytest.mark.slow
def test_state_in_many_groups_is_saved_and_loaded(ranks, megatron, tmp_path):
    common = dict(model=MODEL, parallel=layout(), train=ZERO, zero={"stage": 3}, lr=LR)
    first = ranks.run(curve_in_small_groups, 2, steps=SAVED, save=str(tmp_path), **common)
    for result in ranks.run(curve_in_small_groups, 2, start=SAVED, steps=STEPS, load=first[0]["path"], **common):
        assert_same(result, {what: megatron[what][SAVED:] for what in ("losses", "norms")})


def test_the_curve_of_a_tied_model_is_megatron_s(ranks):
    """Stage 3 must gather the embedding for the output layer, too."""
    tied = dict(model=MODEL | {"tie_embeddings": True}, parallel=layout(), steps=4, lr=LR)
    (expected,) = ranks.run(jobs.curve, 1, train=TRAIN, **tied)
    for result in ranks.run(jobs.curve, 2, train=ZERO, zero={"stage": 3}, **tied):
        assert_same(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_curve_in_bf16_is_near_megatron_s(stage, ranks):
    common = dict(model=MODEL, parallel=layout(), steps=STEPS, lr=LR)
    (expected,) = ranks.run(jobs.curve, 1, train=TRAIN | {"dtype": "bf16"}, **common)
    for result in ranks.run(jobs.curve, 2, train=ZERO | {"dtype": "bf16"}, zero={"stage": stage}, **common):
        assert_same(result, expected, tolerance=2e-3)
        scalars = [p for name, p in result["parameters"].items() if name.endswith(("A_log", "dt_bias"))]
        assert len(scalars) == 2 * MODEL["layer_pattern"].count("G") and all(p.dtype == torch.float32 for p in scalars)


RESUMED = {
    "ZeRO 1, bf16": ({"stage": 1}, {"dtype": "bf16"}),
    "ZeRO 2, bf16, state in host memory": ({"stage": 2, "offload_optimizer": "cpu"}, {"dtype": "bf16"}),
    "ZeRO 3, bf16": ({"stage": 3}, {"dtype": "bf16"}),
    "ZeRO 3, all in host memory": ({"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"}, {}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_unless(name == "ZeRO 3, bf16")) for name in RESUMED])
def test_resuming_is_bit_identical(name, ranks, tmp_path):
    zero, train = RESUMED[name]
    straight = run(ranks, 2, zero, train=train, model=MODEL, steps=4)
    first = run(ranks, 2, zero, train=train, model=MODEL, steps=2, save=str(tmp_path))
    second = run(ranks, 2, zero, train=train, model=MODEL, start=2, steps=4, load=first[0]["path"])
    assert values_that_differ(straight, first, second) == 0
    assert all(result["updates"] == 4 for result in straight + second)


@pytest.mark.parametrize(
    ("count", "parallel", "stage"),
    [(2, layout(2), 2), pytest.param(4, layout(2), 3, marks=pytest.mark.slow), (2, layout(), 3)],
)
def test_a_run_moves_between_engines_and_to_transformers(count, parallel, stage, ranks, megatron, tmp_path):
    """megatron to SAVED -> ZeRO, a step -> megatron to STEPS: one curve. ZeRO's weights are the same model in transformers."""
    from transformers import AutoModelForCausalLM

    until = SAVED + 1
    part = dict(start=SAVED, steps=until, load=megatron["path"], save=str(tmp_path / "zero"))
    for zero in run(ranks, count, {"stage": stage}, parallel, model=MODEL, **part):
        assert_same(zero, {what: megatron[what][SAVED:until] for what in ("losses", "norms")})
    checkpoint = tmp_path / "zero" / f"step-{until:08d}"
    assert not verify(checkpoint).problems

    common = dict(model=MODEL, parallel=layout(), train=TRAIN, lr=LR)
    (back,) = ranks.run(jobs.curve, 1, start=until, steps=STEPS, load=str(checkpoint), **common)
    assert_same(back, {what: megatron[what][until:] for what in ("losses", "norms")})

    tokens = torch.randint(0, MODEL["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(3))
    assert to_theirs(checkpoint, tmp_path / "export") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
    (ours,) = ranks.run(convert_jobs.logits, 1, checkpoint=str(checkpoint), tokens=tokens)
    difference = (ours["logits"][..., : MODEL["vocab_size"]] - expected).abs().max()
    assert difference < 1e-5 * max(1, expected.abs().max())


def test_the_trainer_runs_it(ranks, tmp_path):
    """Evaluation, growing batches, saving and resuming, as with megatron's engine; on from megatron's own checkpoint."""
    tokens = np.cumsum(np.random.default_rng(0).integers(0, 3, 20_000)) % MODEL["vocab_size"]
    tokens.astype("uint16").tofile(tmp_path / "tokens.npy")
    source = [{"path": str(tmp_path / "tokens.npy")}]
    train = TRAIN | dict(steps=6, eval_interval=3, eval_batches=2, batch_ramp=dict(start=4, increment=4, samples=16))
    config = dict(
        run_dir=str(tmp_path / "megatron"),
        model=MODEL,
        train=train,
        data=dict(train=source, validation=source, sequence_length=16),
        checkpoint=dict(interval=3),
        logging=dict(plot_interval=0, tensorboard=False),
    )
    ranks.run(jobs.pretrain_run, 2, config=config)
    zero = config | {"run_dir": str(tmp_path / "zero"), "zero": {"stage": 3}}
    half = train | {"steps": 3, "schedule": {"decay_steps": 6}}
    ranks.run(jobs.pretrain_run, 2, config=config | {"run_dir": zero["run_dir"], "train": half})
    results = ranks.run(jobs.pretrain_run, 2, config=zero | {"train": train | {"engine": "deepspeed"}})
    assert results[0]["progress"] == {"step": 6, "samples": 32, "tokens": 32 * 16, "updates": 6}
    expected, found = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("megatron", "zero")
    )
    for key in ("loss", "z_loss", "grad_norm", "lr", "batch_size", "eval_loss"):
        ours, theirs = ([line[key] for line in lines if line.get(key) is not None] for lines in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-5) and ours, key


def test_offload_that_cannot_be_had_here_names_the_field(ranks):
    zero = {"stage": 3, "offload_optimizer": "cpu", "offload_fraction": 0.5}
    with pytest.raises(AssertionError, match=r"zero.offload_fraction: 0.5 leaves a part on a GPU.*set it to 1.0"):
        run(ranks, 1, zero)


def steps_around_a_bad_one(parallel: dict, train: dict, zero: dict, with_bad: bool) -> dict:
    """Steps 0 and 2 of a run, with or without a step 1 between them whose gradient is not a number on the last rank."""
    engine = jobs.make_engine(MODEL, parallel, ZERO | train, zero=zero)
    norms, states = [], []
    for step in (0, 1, 2) if with_bad else (0, 2):
        hook = None
        if step == 1 and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            victim = next(p for name, p, _ in engine.parameters if "in_proj" in name)
            hook = victim.register_hook(lambda gradient: gradient * float("nan"))
        batches = jobs.batches_of(engine, jobs.samples_of_step(step, 8, MODEL["vocab_size"]), 2)
        engine.forward_backward(batches)
        norms.append(engine.gradient_norm())
        if hook:
            hook.remove()
        if step != 1:
            engine.update(1e-3, norms[-1])
        states.append(jobs.everything(engine))
    return {"norms": norms, "states": states, "updates": engine.optimizer.updates}


SKIPPED = {
    "ZeRO 2, TP2, bf16": (2, layout(2), {"dtype": "bf16"}, {"stage": 2}),
    "ZeRO 2, bf16, state in host memory": (2, layout(), {"dtype": "bf16"}, {"stage": 2, "offload_optimizer": "cpu"}),
    "ZeRO 3, bf16": (2, layout(), {"dtype": "bf16"}, {"stage": 3}),
    "ZeRO 3, state in host memory": (2, layout(), {}, {"stage": 3, "offload_optimizer": "cpu"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=slow_unless(name in ("ZeRO 2, TP2, bf16", "ZeRO 3, bf16"))) for name in SKIPPED]
)
def test_a_skipped_step_leaves_everything_as_it_was(name, ranks):
    count, parallel, train, zero = SKIPPED[name]
    common = dict(parallel=parallel, train=train, zero=zero)
    with_bad = ranks.run(steps_around_a_bad_one, count, with_bad=True, **common)
    without = ranks.run(steps_around_a_bad_one, count, with_bad=False, **common)
    for found, expected in zip(with_bad, without, strict=True):
        assert found["norms"][1] == float("inf") and found["norms"][::2] == expected["norms"]
        assert found["updates"] == expected["updates"] == 2
        for a, b in ((0, 0), (1, 0), (2, 1)):
            for what in ("parameters", "moments"):
                for tensor, value in expected["states"][b][what].items():
                    assert torch.equal(found["states"][a][what][tensor], value), tensor
