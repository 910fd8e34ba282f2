"""FP8 tensors that kernels hand to linears (model/backends/current_scaling.py), next to linears that cast themselves."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from testing import gpu_jobs as jobs
from testing.gpu_settings import casts_in_linears

pytestmark = pytest.mark.skipif(not find_spec("transformer_engine"), reason="Transformer Engine is not installed")
TENSORWISE = jobs.FORMATS["fp8 tensorwise"]
CASES = {
    "plain": jobs.job(dtype="bf16", precision=TENSORWISE),
    "small suite": jobs.job(dtype="bf16", precision=TENSORWISE, **jobs.SMALL),
    "selective recompute": jobs.job(jobs.layout(recompute_granularity="selective"), "bf16", TENSORWISE),
    "full recompute": jobs.job(jobs.layout(recompute_granularity="full"), "bf16", TENSORWISE),
    "FP8 parameters": jobs.job(dtype="bf16", precision=jobs.FORMATS["fp8 tensorwise, parameters"]),
    "ends in bf16": jobs.job(dtype="bf16", precision=jobs.FORMATS["fp8 tensorwise, ends in bf16"]),
}
S, B, H, FFN = 96, 2, 256, 512


@pytest.fixture(scope="module")
def recipe():
    from transformer_engine.common.recipe import Float8CurrentScaling

    return Float8CurrentScaling()


@pytest.fixture(scope="module")
def handing():
    from megatron_hybrid.model.backends import current_scaling

    return current_scaling


def randn(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


class _Replace(torch.autograd.Function):
    """Pass on another gradient, as the backward pass of an operation behind a linear does."""

    @staticmethod
    def forward(ctx, y, gradient):
        ctx.gradient = gradient
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return ctx.gradient, None


def through(linear, recipe, x: torch.Tensor, dy, drop: bool) -> list[torch.Tensor]:
    """Return a linear's output and gradients, from an input and a gradient in bf16 or FP8."""
    import transformer_engine.pytorch as te

    source = x.detach().requires_grad_()
    with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
        y = linear(source)
    if drop:
        source.update_usage(rowwise_usage=False, columnwise_usage=True)
    loss = _Replace.apply(y, dy).float().sum()
    return [y.detach(), *torch.autograd.grad(loss, [source, linear.weight])]


def test_a_linear_takes_handed_casts_for_its_own(recipe, handing):
    """Its output and both gradients have the same bits as from its own casts."""
    import transformer_engine.pytorch as te

    linear = te.Linear(H, FFN, bias=False, params_dtype=torch.bfloat16)
    x, dy = randn(S, B, H, seed=0), randn(S, B, FFN, seed=1)
    expected = through(linear, recipe, x, dy, drop=False)
    gradient = handing.HandedGradient.of(handing.gradient_quantizer(recipe)(dy))
    for found in (
        through(linear, recipe, x, gradient, drop=False),
        through(linear, recipe, handing.input_quantizer(recipe, columnwise=True)(x), dy, drop=True),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_activation_s_scale_is_that_of_its_output(recipe, handing):
    """Its largest value is taken before it is rounded to bf16."""
    import transformer_engine_torch as kernels

    gate_up, dy = randn(S, B, 2 * FFN, seed=2), randn(S, B, FFN, seed=3)
    for run, quantizer, spacing in (
        (lambda q: kernels.swiglu(gate_up, q), handing.input_quantizer(recipe, columnwise=True), 2**-3),
        (lambda q: kernels.dswiglu(dy, gate_up, q), handing.gradient_quantizer(recipe), 2**-2),
    ):
        found, plain = run(quantizer), run(None)
        expected, smallest = quantizer(plain), 1e-5 * float(plain.abs().amax())
        torch.testing.assert_close(found._scale_inv, expected._scale_inv, rtol=2**-8, atol=0)
        torch.testing.assert_close(found.dequantize(), expected.dequantize(), rtol=spacing + 2**-6, atol=smallest)
        assert torch.equal(found._transpose.flatten(1).t().contiguous(), found._data.flatten(0, 1))


def test_an_mlp_keeps_no_more(recipe):
    """Bytes that live after the forward pass."""
    import transformer_engine.pytorch as te

    from megatron_hybrid.model.backends.transformer_engine import FusedSwiGLU

    class Linear(te.Linear):
        def forward(self, x):
            return super().forward(x), None

    mlp = FusedSwiGLU.__new__(FusedSwiGLU)
    torch.nn.Module.__init__(mlp)
    mlp.config = SimpleNamespace(recompute_granularity=None)
    options = dict(bias=False, params_dtype=torch.bfloat16)
    mlp.linear_fc1, mlp.linear_fc2 = Linear(H, 2 * FFN, **options), Linear(FFN, H, **options)
    x = randn(S * 64, B, H, seed=4).requires_grad_()

    def kept() -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            y, _ = mlp(x)
        torch.cuda.synchronize()
        found = torch.cuda.memory_allocated() - before
        y.sum().backward()
        return found

    kept()  # what is made once
    handed = kept()
    with casts_in_linears():
        assert handed <= kept() + 2**16


@pytest.fixture(scope="module")
def found():
    both = {f"{name}, {how}": case | more for name, case in CASES.items() for how, more in SETTINGS.items()}
    return jobs.side_by_side(both, 6)


SETTINGS = {"handed": {}, "casts": dict(setting="casts in linears")}


@pytest.mark.parametrize("name", CASES)
def test_curves_agree(name, found):
    handed, casts = found[f"{name}, handed"], found[f"{name}, casts"]
    assert handed["losses"] != casts["losses"], "both ran the same casts"
    for what, allowed in (("losses", 5e-3), ("norms", 5e-2)):
        assert jobs.difference(casts, handed, what) <= allowed, (casts[what], handed[what])


@pytest.mark.parametrize("name", ["selective recompute", "full recompute"])
def test_recompute_changes_next_to_nothing(name, found):
    assert jobs.difference(found["plain, handed"], found[f"{name}, handed"], "losses") <= 1e-3
