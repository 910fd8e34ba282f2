"""Muon against torch.optim.Muon and a plain fp64 Muon on whole tensors, under every kind of layout."""

from functools import partial

import pytest
import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from testing import muon
from testing.layouts import LAYOUTS, MODEL, QWEN
from tests.distributed.test_same_curve import slow_unless

if muon.NOT_HERE:
    pytest.skip(muon.REASON, allow_module_level=True)

STEPS = 3
TOLERANCE = 1e-6
"""For momenta that are equal in all bits. The iteration magnifies rounding: other last bits change the update by 1.3e-6, as much as
the error of the iteration in fp32."""
ROUNDED = 5e-6
EXACT = 0.5
"""Momentum with which no mean of momentum and gradient is rounded."""
SIMPLE = dict(muon_coefficient_type="simple", muon_nesterov=True)
QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""Published at leloykun.github.io/ponder/muon-opt-coeffs, used by modded-nanogpt."""
NAMES = (
    "one rank, plain optimizer",
    "DP2",
    "DP2, plain optimizer",
    "TP2",
    "PP2, VPP2",
    "TP4, padded heads",
    "TP2, DP2",
    "PP2, VPP2, DP2, overlapped",
    "CP2",
)
QUICK = ("one rank, plain optimizer", "DP2", "TP2", "TP4, padded heads", "TP2, DP2", "PP2, VPP2")


def run(ranks, name: str, model: dict = MODEL, **options) -> list[dict]:
    count, parallel = LAYOUTS[name]
    train = dict(steps=STEPS, global_batch_size=8, dtype="fp32", optimizer=muon.MUON | {"clip_grad": 0.0} | options)
    return ranks.run(muon.updated, count, model=model, parallel=parallel, train=train, steps=STEPS)


def torch_muon(momentum: float):
    options = dict(lr=muon.LR, weight_decay=muon.DECAY, nesterov=True, adjust_lr_fn="match_rms_adamw")
    return partial(torch.optim.Muon, momentum=momentum, **options)


def plain(model: dict, before: dict[str, torch.Tensor], make_muon, clip: float = 0.0) -> dict[str, torch.Tensor]:
    no_decay = {name for name, spec in model_tensors(ModelConfig(**model)).items() if spec.decay_group == "embedding"}
    return muon.plain_steps(before, STEPS, no_decay, make_muon, clip)


def assert_same_updates(results: list[dict], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    before, after = (muon.joined(results, when) for when in ("before", "after"))
    assert after.keys() == expected.keys()
    errors = {name: muon.update_error(after[name], expected[name], before[name]) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"
    assert all(result["padding"] == 0 for result in results)


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_unless(name in QUICK)) for name in NAMES])
def test_updates_are_those_of_torch(name, ranks):
    model = MODEL | {"layer_pattern": "GGGA*2" if "PP" in name else "GA"}
    results = run(ranks, name, model, muon_momentum=EXACT, **SIMPLE)
    with muon.torch_muon_in_fp32():
        expected = plain(model, muon.joined(results, "before"), torch_muon(EXACT))
    assert_same_updates(results, expected, TOLERANCE)


def test_clipping_is_by_the_norm_of_all_parameters(ranks):
    model = MODEL | {"layer_pattern": "GA"}
    results = run(ranks, "TP2, DP2", model, clip_grad=0.2, **SIMPLE)
    with muon.torch_muon_in_fp32():
        expected = plain(model, muon.joined(results, "before"), torch_muon(0.95), clip=0.2)
    assert_same_updates(results, expected, ROUNDED)
    norm = sum(float(muon.gradient(n, tuple(v.shape), 0).double().norm()) ** 2 for n, v in expected.items()) ** 0.5
    assert results[0]["norms"][0] == pytest.approx(norm, rel=1e-6) and norm > 0.2


def test_in_bf16_updates_are_those_of_torch_up_to_rounding(ranks):
    model = MODEL | {"layer_pattern": "GA"}
    results = run(ranks, "TP2", model, muon_momentum=EXACT, muon_fp32_matmul_prec="medium", **SIMPLE)
    expected = plain(model, muon.joined(results, "before"), torch_muon(EXACT))
    assert_same_updates(results, expected, 0.02)


@pytest.mark.parametrize("mode", ["duplicated", "distributed"])
def test_grouped_heads_and_gates_on_dummies_alone(mode, ranks):
    """At TP4 one rank has no Gated DeltaNet and two have no attention, but they take part in the exchanges."""
    model = QWEN | {"layer_pattern": "GA"}
    results = run(ranks, "TP4, padded heads", model, muon_tp_mode=mode, muon_momentum=EXACT, **SIMPLE)
    with muon.torch_muon_in_fp32():
        expected = plain(model, muon.joined(results, "before"), torch_muon(EXACT))
    assert_same_updates(results, expected, TOLERANCE if mode == "duplicated" else ROUNDED)


def test_the_default_iteration_and_other_scales(ranks):
    for mode, scale in (
        ("spectral", lambda m, n: max(m, n) ** 0.5),
        ("shape_scaling", lambda m, n: max(1, m / n) ** 0.5),
        ("unit_rms_norm", lambda m, n: (m / n) ** 0.5),
    ):
        results = run(ranks, "TP2", MODEL | {"layer_pattern": "GA"}, muon_scale_mode=mode, muon_momentum=0.9)
        expected = plain(
            MODEL,
            muon.joined(results, "before"),
            lambda matrices, scale=scale: muon.PlainMuon(
                matrices, muon.LR, muon.DECAY, 0.9, False, QUINTIC, lambda m, n: 0.2 * scale(m, n)
            ),
        )
        assert_same_updates(results, expected, ROUNDED)


def test_packed_projections_are_orthogonalized_one_by_one(ranks):
    """q, k and v of Gated DeltaNet: all singular values are near the scale. Together they would be near it only as one matrix."""
    (result,) = run(ranks, "one rank, plain optimizer", MODEL | {"layer_pattern": "GA"}, weight_decay=0.0)
    before, after = (muon.joined([result], when) for when in ("before", "after"))
    parts = [after[name] - before[name] for name in (f"layers.0.gdn.{one}_proj.weight" for one in "qkv")]
    for update in parts:
        values = torch.linalg.svdvals(update) / (muon.LR * 0.2 * max(update.shape) ** 0.5)
        assert 0.5 * STEPS < float(values.max()) < 1.3 * STEPS
    together = torch.linalg.svdvals(torch.cat([part / max(part.shape) ** 0.5 for part in parts])) / (muon.LR * 0.2)
    assert float(together.max()) > 1.3 * STEPS


def test_blockwise_depends_on_the_layout(ranks):
    model = MODEL | {"layer_pattern": "GA"}
    after = [
        muon.joined(run(ranks, name, model, muon_tp_mode="blockwise"), "after")
        for name in ("one rank, plain optimizer", "TP4, padded heads")
    ]
    name = "layers.0.mlp.gate_proj.weight"
    assert not torch.allclose(after[0][name], after[1][name], rtol=0.05)
    assert torch.allclose(after[0]["layers.0.mixer_norm.weight"], after[1]["layers.0.mixer_norm.weight"])


def test_low_rank_projections_without_heads(ranks):
    kda = dict(num_heads=3, key_head_dim=8, value_head_dim=8)
    model = MODEL | {"layer_pattern": "KA", "kda": kda}
    results = run(ranks, "TP2", model, muon_momentum=EXACT, **SIMPLE)
    with muon.torch_muon_in_fp32():
        expected = plain(model, muon.joined(results, "before"), torch_muon(EXACT))
    assert "layers.0.kda.f_b_proj.weight" in expected
    assert_same_updates(results, expected, TOLERANCE)
