"""Adam's state in host memory (train.optimizer.offload_fraction): the curve, resuming, skipped steps and checkpoints of a run without.

On CPU ranks both of megatron-core's sub-optimizers are torch's fused Adam; a run without offload has torch's plain one. Streams and
page-locked memory are stand-ins (distributed/cpu_backend.py): tests/gpu has the real ones.
"""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_hybrid.convert.verify import verify
from testing import jobs
from testing.layouts import LR, MODEL, STEPS, TRAIN, assert_same, layout
from testing.parallel import OVERLAP
from tests.distributed.test_same_curve import slow_unless

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-4}
"""Two Adams that round differently: measured 1.2e-7 in fp32, and 0 in bf16, where weights are rounded after them."""


def settings(fraction: float, dtype: str = "fp32", **more) -> dict:
    return TRAIN | dict(dtype=dtype, optimizer=TRAIN["optimizer"] | dict(offload_fraction=fraction) | more)


def run(ranks, count: int = 1, parallel: dict | None = None, *, fraction: float, dtype: str = "fp32", **more):
    common = dict(model=MODEL, parallel=parallel or layout(), train=settings(fraction, dtype))
    return ranks.run(jobs.curve, count, **common | {"steps": STEPS, "lr": LR} | more)


@pytest.fixture(scope="module")
def plain(ranks):
    """The curve of one rank without offload, by dtype."""
    return {dtype: run(ranks, fraction=0.0, dtype=dtype)[0] for dtype in ("fp32", "bf16")}


CURVES = {
    # name: (ranks, layout, fraction, dtype)
    **{f"{share:.0%}, {dtype}": (1, layout(), share, dtype) for share in (0.5, 1.0) for dtype in ("fp32", "bf16")},
    "a half, DP2": (2, layout(), 0.5, "fp32"),
    "a half, DP2, overlapped": (2, layout(**OVERLAP), 0.5, "fp32"),
    "a half, TP2": (2, layout(2), 0.5, "fp32"),
    "a half, PP2, VPP2": (2, layout(pp=2, vpp=2), 0.5, "fp32"),
    "all, TP2, PP2": (4, layout(2, 2), 1.0, "fp32"),
}
QUICK = ("50%, fp32", "50%, bf16", "100%, bf16", "a half, DP2, overlapped")


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_unless(name in QUICK)) for name in CURVES])
def test_the_curve_is_that_of_a_run_without(name, ranks, plain):
    count, parallel, fraction, dtype = CURVES[name]
    for result in run(ranks, count, parallel, fraction=fraction, dtype=dtype):
        assert_same(result, plain[dtype], TOLERANCE[dtype])
        assert result["updates"] == STEPS


def where_state_lies(fraction: float, dtype: str, no_decay: tuple[str, ...]) -> dict:
    """Names of the parameters whose state the host has, and where the tensors of the others' state are updated."""
    engine = jobs.make_engine(MODEL, layout(), settings(fraction, dtype, no_decay=no_decay))
    engine.forward_backward(jobs.batches_of(engine, jobs.samples_of_step(0, 8, MODEL["vocab_size"]), 2))
    engine.update(1e-3, engine.gradient_norm())
    (part,) = engine.optimizer._parts()
    hybrid, names = part.optimizer, {p: name for name, p, _ in jobs.named_parameters(engine)}
    shards = (part.model_fp32_groups, part.shard_fp32_groups), (part.model_float16_groups, part.shard_float16_groups)
    of = {
        s: names[p]
        for models, mine in shards
        for m, ss in zip(models, mine, strict=True)
        for p, s in zip(m, ss, strict=True)
    }
    decay = {of[p]: group["weight_decay"] for group in hybrid.param_groups for p in group["params"]}
    inner = {
        of[hybrid.inner_param_to_orig_param[p]]: (group["lr"], group["weight_decay"])
        for adam in hybrid.sub_optimizers
        for group in adam.param_groups
        for p in group["params"]
    }
    return {
        "host": {of[p]: p.numel() for p in hybrid.gpu_params_map_cpu_copy},
        "all": {name: shard.numel() for shard, name in of.items()},
        "adams": (len(hybrid.cpu_optimizers), hybrid.gpu_optimizer is not None),
        "inner": inner,
        "decay": decay,
        "name": engine.optimizer.name,
    }


@pytest.mark.parametrize("fraction", [0.3, 1.0])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_share_is_kept_and_every_adam_has_its_groups_rates(fraction, dtype, ranks):
    (found,) = ranks.run(where_state_lies, 1, fraction=fraction, dtype=dtype, no_decay=("embedding", "gdn_scalars"))
    held, total = sum(found["host"].values()), sum(found["all"].values())
    assert fraction * total <= held <= fraction * total + max(found["all"].values())
    assert found["adams"] == (len(found["host"]), fraction < 1)
    assert f"{held / total:.1%} of the state in host memory" in found["name"]
    assert found["inner"] == {name: (1e-3, decay) for name, decay in found["decay"].items()}
    undecayed = {name for name, decay in found["decay"].items() if decay == 0}
    assert {name.rsplit(".", 1)[-1] for name in undecayed} >= {"A_log", "dt_bias"} and len(undecayed) < len(
        found["all"]
    )


def test_fp32_parameters_that_stay_on_the_device_are_trained(ranks):
    """megatron-core hands gradients to copies alone."""
    (left,) = ranks.run(where_state_lies, 1, fraction=1e-6, dtype="bf16", no_decay=())
    names = [name for name in left["all"] if name.endswith(("A_log", "dt_bias"))]
    assert set(names) - set(left["host"])
    few, none = (run(ranks, fraction=fraction, dtype="bf16", steps=4)[0]["parameters"] for fraction in (1e-6, 0.0))
    for name in names:
        torch.testing.assert_close(few[name], none[name], rtol=1e-6, atol=1e-7)


RESUMED = {
    # name: (ranks, layout, fraction, more)
    "a half": (1, layout(), 0.5, {}),
    "all": (1, layout(), 1.0, {}),
    "a half, DP2, overlapped": (2, layout(**OVERLAP), 0.5, {}),
    "a half, TP2, written in the background": (2, layout(2), 0.5, {"async_save": True}),
    "a half, fp32": (1, layout(), 0.5, {"dtype": "fp32"}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow_unless(n != "a half, fp32")) for n in RESUMED])
def test_resuming_is_bit_identical(name, ranks, tmp_path):
    count, parallel, fraction, more = RESUMED[name]
    common = dict(fraction=fraction, dtype=more.get("dtype", "bf16"))
    straight = run(ranks, count, parallel, steps=4, **common)
    saving = dict(steps=2, save=str(tmp_path), async_save=more.get("async_save", False))
    first = run(ranks, count, parallel, **saving, **common)
    second = run(ranks, count, parallel, start=2, steps=4, load=first[0]["path"], **common)
    for one, a, b in zip(straight, first, second, strict=True):
        assert a["losses"] + b["losses"] == one["losses"]
        assert a["norms"] + b["norms"] == one["norms"]
        assert one["updates"] == b["updates"] == 4
        for parameter, value in one["parameters"].items():
            assert torch.equal(value, b["parameters"][parameter]), parameter


def curve_in_many_files(**arguments) -> dict:
    from megatron_hybrid.checkpoint import writer

    writer.FILE_BYTES = 100_000
    return jobs.curve(**arguments)


def test_a_checkpoint_of_many_files_is_whole(ranks, tmp_path):
    common = dict(model=MODEL, parallel=layout(), train=settings(0.5, "bf16"), lr=LR)
    straight = run(ranks, 2, fraction=0.5, dtype="bf16", steps=4)
    first = ranks.run(curve_in_many_files, 2, steps=2, save=str(tmp_path), **common)
    path = Path(first[0]["path"])
    assert len(list(path.glob("*.safetensors"))) > 4
    assert not verify(path).problems
    second = ranks.run(curve_in_many_files, 2, start=2, steps=4, load=str(path), **common)
    for one, a, b in zip(straight, first, second, strict=True):
        assert a["losses"] + b["losses"] == one["losses"]


def loaded(fraction: float, path: str) -> dict:
    """Parameters and optimizer state of a run that has just loaded a checkpoint, and its copies of fp32 parameters."""
    from megatron_hybrid.arch.model import ModelConfig
    from megatron_hybrid.checkpoint.manager import CheckpointManager
    from megatron_hybrid.config.checkpoint import CheckpointConfig

    engine = jobs.make_engine(MODEL, layout(), settings(fraction, "bf16"))
    model = ModelConfig(**MODEL).model_dump(mode="json")
    manager = CheckpointManager(CheckpointConfig(), Path("."), engine.collector(), model, {})
    state, _ = manager.load(Path(path))
    engine.optimizer.set_updates(state["updates"])
    copies = [
        (shard.detach().clone(), copy.clone())
        for part in engine.optimizer._parts()
        if fraction
        for shard, copy in part.optimizer.gpu_params_map_cpu_copy.items()
        if shard.dtype == torch.float32
    ]
    return jobs.everything(engine) | {"copies": copies, "updates": engine.optimizer.updates}


def test_what_is_loaded_is_what_was_saved_whoever_keeps_it(ranks, tmp_path):
    (saved,) = run(ranks, fraction=0.5, dtype="bf16", steps=3, save=str(tmp_path))
    (expected,) = ranks.run(loaded, 1, fraction=0.0, path=saved["path"])
    assert len(expected["moments"]) > 20 and all(value.abs().max() > 0 for value in expected["moments"].values())
    for fraction in (0.5, 1.0):
        (found,) = ranks.run(loaded, 1, fraction=fraction, path=saved["path"])
        assert found["updates"] == expected["updates"] == 3
        for what in ("parameters", "moments"):
            assert found[what].keys() == expected[what].keys()
            for name, value in expected[what].items():
                assert torch.equal(found[what][name], value), name
        assert found["copies"] and all(torch.equal(shard, copy) for shard, copy in found["copies"])


def test_a_run_moves_between_all_ways(ranks, plain, tmp_path):
    """Not offloaded -> a half -> DeepSpeed -> all on the host -> not offloaded: one curve."""
    ways: list[tuple[str, dict]] = [("none", {"fraction": 0.0}), ("half", {"fraction": 0.5})]
    if find_spec("deepspeed"):
        ways.append(("zero", {"train": TRAIN | {"engine": "deepspeed"}, "zero": {"stage": 2}}))
    ways += [("all", {"fraction": 1.0}), ("none again", {"fraction": 0.0})]
    path, bounds = None, range(STEPS + 1)
    for (name, how), (start, end) in zip(ways, pairwise(bounds)):
        part = dict(start=start, steps=end, load=path, save=str(tmp_path / name))
        (found,) = run(ranks, **{"fraction": 0.0} | how, **part)
        assert_same(found, {what: plain["fp32"][what][start:end] for what in ("losses", "norms")})
        assert found["updates"] == end
        path = found["path"]


@pytest.mark.parametrize("fraction", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_skipped_step_leaves_everything_as_it_was(fraction, value, ranks):
    train = settings(fraction, "bf16")
    for found in ranks.run(
        jobs.step_with_bad_gradient, 2, model=MODEL, parallel=layout(), train=train, value=value, bad_rank=1
    ):
        before, bad, after = found["states"]
        assert [reason is None for reason in found["reasons"]] == [True, False, True]
        for what in ("parameters", "moments"):
            assert before[what].keys() == bad[what].keys()
            for name, tensor in before[what].items():
                assert torch.equal(tensor, bad[what][name]), name
        assert all(torch.isfinite(tensor).all() for tensor in after["parameters"].values())
        assert any(not torch.equal(tensor, after["moments"][name]) for name, tensor in before["moments"].items())
