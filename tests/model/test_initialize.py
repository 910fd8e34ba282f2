"""Initial weights: AI2's distributions, the same under every layout, dummy heads zero and left zero by training."""

import pytest
import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.model.initialize import initial_value
from testing import jobs
from testing.models import hybrid

MODEL = hybrid("GA", 64, 6, 8, head_dim=8)
TRAIN = dict(steps=3, global_batch_size=4, dtype="fp32", optimizer=dict(weight_decay=0.1))


def padded_values(parallel: dict) -> dict[str, list[float]]:
    """Largest absolute value of each parameter outside its pieces, before and after three steps."""
    engine = jobs.make_engine(MODEL, parallel, TRAIN)
    found: dict[str, list[float]] = {}

    def look():
        for name, parameter, pieces in engine.layout.parameters(engine.chunks):
            rest = parameter.detach().clone()
            for piece in pieces:
                piece.target.narrow(rest).zero_()
            found.setdefault(name, []).append(rest.abs().max().item())

    look()
    for step in range(3):
        engine.forward_backward(jobs.batches_of(engine, jobs.samples_of_step(step, 4, 131), 1))
        engine.update(1e-2, engine.gradient_norm())
    look()
    return found


def test_dummy_heads_stay_zero_under_training(ranks):
    results = ranks.run(padded_values, 4, parallel=dict(tensor_parallel_size=4))
    padded = 0
    for found in results:
        assert all(value == 0 for values in found.values() for value in values), found
        padded += len(found)
    assert padded


def test_values():
    model = ModelConfig(
        **MODEL | {"gdn": MODEL["gdn"] | {"num_key_heads": 512, "num_value_heads": 512}, "vocab_size": 4000}
    )
    for spec in model_tensors(model).values():
        value = initial_value(spec, model, seed=1)
        assert value.shape == spec.shape and torch.isfinite(value).all()
        if spec.decay_group == "norm":
            assert (value == 1).all()
        elif spec.name.endswith("A_log"):
            a = value.exp()
            assert 0 < a.min() < 1 and 15 < a.max() <= 16 and abs(a.mean() - 8) < 1
        elif spec.name.endswith("dt_bias"):
            dt = torch.nn.functional.softplus(value)
            assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
            assert abs(dt.log().mean() - torch.tensor([1e-3, 0.1]).log().mean()) < 0.3
        else:
            assert (
                abs(value.std() - 0.02) < 0.02 * 5 / value.numel() ** 0.5
                and abs(value.mean()) < 0.1 / value.numel() ** 0.5
            )


def test_another_seed_or_tensor_draws_other_values():
    model = ModelConfig(**MODEL)
    q, k = (model_tensors(model)[f"layers.0.gdn.{x}_proj.weight"] for x in "qk")
    assert torch.equal(initial_value(q, model, 1), initial_value(q, model, 1))
    assert not torch.equal(initial_value(q, model, 1), initial_value(q, model, 2))
    assert not torch.equal(initial_value(q, model, 1), initial_value(k, model, 1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_log_and_dt_bias_are_fp32_whatever_the_models_dtype(dtype, ranks):
    (result,) = ranks.run(jobs.curve, 1, model=MODEL, parallel={}, train=TRAIN | {"dtype": dtype}, steps=1)
    for name, parameter in result["parameters"].items():
        always = name.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if always or dtype == "fp32" else torch.bfloat16), name
