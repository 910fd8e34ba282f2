"""Triton kernels in fp32 under the interpreter, forward and every gradient, against fp64 oracles."""

import pytest
import torch

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.gated_delta_rule import explain, gated_delta_rule
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from hybrid_kernels.testing import delta_rule_inputs, packed_inputs, relative_error


def gradients(fn, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = fn(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    return (*results, *torch.autograd.grad(results, leaves, given))


def agree(fn, inputs, tolerance):
    """fn(backend) -> function of inputs; every result and gradient of "triton" against "torch" in fp64."""
    exact = gradients(fn("torch"), [x.double() for x in inputs])
    for ours, oracle in zip(gradients(fn("triton"), inputs), exact):
        assert torch.isfinite(ours).all()
        assert relative_error(ours, oracle, floor=1e-2) < tolerance


def delta_rule(**options):
    def of(backend):
        def fn(q, k, v, g, beta, initial):
            return gated_delta_rule(
                q, k, v, g, beta, initial_state=initial, output_final_state=True, backend=backend, **options
            )

        return fn

    return of


@pytest.mark.parametrize(
    "length, key_heads, heads, key_dim, save",
    [(1, 1, 1, 16, "scores"), (65, 1, 2, 96, "states"), (64, 1, 1, 32, "inputs"), (63, 1, 1, 64, "scores")],
)
def test_gated_delta_rule(length, key_heads, heads, key_dim, save):
    inputs = delta_rule_inputs(1, length, key_heads, heads, key_dim, 64)
    agree(delta_rule(save=save), [*inputs, torch.randn(1, heads, key_dim, 64)], 2e-5)


@pytest.mark.parametrize("hard", [dict(beta=1.99, cosine=1.0, gate=-1e-3), dict(cosine=0.9, gate=-50.0)])
def test_gated_delta_rule_where_it_is_hard(hard):
    inputs = delta_rule_inputs(1, 70, 1, 1, 32, 64, **hard)
    agree(delta_rule(), [*inputs, torch.randn(1, 1, 32, 64)], 3e-4)


def test_gated_delta_rule_of_documents():
    bounds = torch.tensor([0, 1, 1, 66, 80])
    inputs = delta_rule_inputs(1, 80, 1, 1, 32, 64)
    agree(delta_rule(cu_seqlens=bounds), [*inputs, torch.randn(4, 1, 32, 64)], 2e-5)


def test_gated_delta_rule_in_bf16_twice():
    inputs = delta_rule_inputs(1, 70, 1, 1, 32, 64, dtype=torch.bfloat16)
    assert explain(*inputs).backend == "triton"
    first, second = (gated_delta_rule(*inputs, backend="triton")[0] for _ in range(2))
    exact, _ = gated_delta_rule(*(x.double() for x in inputs), backend="torch")
    assert torch.equal(first, second) and relative_error(first, exact) < 2e-2


def test_beta_of_zero_has_its_gradient():
    inputs = delta_rule_inputs(1, 20, 1, 1, 16, 64)
    inputs[4][:, ::3] = 0.0
    agree(delta_rule(), [*inputs, torch.randn(1, 1, 16, 64)], 1e-4)


@pytest.mark.parametrize("bounds", [None, [0, 1, 1, 3, 20, 37]])
def test_conv_gates(bounds, monkeypatch):
    from hybrid_kernels.conv_gates import triton_op

    for name, size in (("SEGMENTS", 16), ("FORWARD_SEGMENT", 4), ("BACKWARD_SEGMENT", 4)):
        monkeypatch.setattr(triton_op, name, size)
    batch, length, heads, dim, values = (2, 70, 1, 96, 64) if bounds is None else (1, 37, 2, 32, 16)
    options = dict(num_key_heads=1, num_value_heads=heads, key_head_dim=dim, value_head_dim=values, return_gate=True)
    if bounds:
        options["cu_seqlens"] = torch.tensor(bounds)
    inputs = packed_inputs(length, batch, 1, heads, dim, values)
    agree(lambda backend: lambda *x: conv_gates(*x, backend=backend, **options), inputs, 1e-5)


def test_gated_rmsnorm():
    o, packed, weight = torch.randn(2, 9, 3, 96), torch.randn(9, 2, 300), torch.randn(96)

    def of(backend):
        return lambda o, packed, weight: gated_rmsnorm(o, packed[..., 5:293], weight, 1e-5, backend=backend)

    agree(of, [o, packed, weight], 1e-5)
