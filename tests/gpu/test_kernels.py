"""Every fast kernel on the GPU in bf16 against fp64, where it is hard, and bitwise the same twice."""

import pytest
import torch

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.gated_delta_rule import explain, gated_delta_rule
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from hybrid_kernels.testing import delta_rule_inputs, packed_inputs, relative_error

NAMES = ("o", "final", "dq", "dk", "dv", "dg", "dbeta", "dinitial")
TOLERANCES = dict(o=6e-3, final=6e-3, dq=8e-3, dk=8e-3, dv=8e-3, dg=2e-2, dbeta=2e-2, dinitial=8e-3)


def delta_rule(inputs, backend, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    initial = leaves[5] if len(leaves) > 5 else None
    results = gated_delta_rule(*leaves[:5], initial_state=initial, output_final_state=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) for x in results]
    return (*results, *torch.autograd.grad(results, leaves, given))


def agree(inputs, backend, **options):
    try:
        ours = delta_rule(inputs, backend, **options)
    except ValueError as error:
        pytest.skip(str(error))
    again = delta_rule(inputs, backend, **options)
    options.pop("save", None)
    exact = delta_rule([x.double() for x in inputs], "torch", **options)
    for name, x, y, z in zip(NAMES, ours, again, exact):
        assert torch.isfinite(x).all(), name
        assert torch.equal(x, y), f"{name} differs from one run to the next"
        assert relative_error(x, z, floor=1e-2) < TOLERANCES[name], name


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("key_heads, heads, key_dim, value_dim", [(2, 2, 96, 192), (1, 2, 128, 128), (1, 1, 64, 64)])
def test_gated_delta_rule(backend, length, key_heads, heads, key_dim, value_dim):
    inputs = delta_rule_inputs(2, length, key_heads, heads, key_dim, value_dim, dtype=torch.bfloat16, device="cuda")
    agree([*inputs, torch.randn(2, heads, key_dim, value_dim, device="cuda")], backend)


@pytest.mark.parametrize("key_dim, value_dim", [(192, 256), (256, 128), (32, 64)])
def test_gated_delta_rule_of_other_widths(key_dim, value_dim):
    agree(delta_rule_inputs(1, 200, 1, 1, key_dim, value_dim, dtype=torch.bfloat16, device="cuda"), "triton")


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize(
    "hard", [dict(beta=1.99), dict(cosine=0.5), dict(cosine=0.9, gate=0.0), dict(gate=-1e-3), dict(gate=-50.0)]
)
@pytest.mark.parametrize("save", ["inputs", "scores", "states"])
def test_gated_delta_rule_where_it_is_hard(backend, hard, save):
    agree(delta_rule_inputs(1, 512, 2, 2, 96, 192, dtype=torch.bfloat16, device="cuda", **hard), backend, save=save)


@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_gated_delta_rule_of_documents(backend):
    bounds = torch.tensor([0, 1, 1, 64, 129, 700, 1000], device="cuda")
    inputs = delta_rule_inputs(1, 1000, 1, 2, 96, 192, dtype=torch.bfloat16, device="cuda")
    agree([*inputs, torch.randn(6, 2, 96, 192, device="cuda")], backend, cu_seqlens=bounds)


def test_gated_delta_rule_in_a_cuda_graph():
    inputs = delta_rule_inputs(1, 256, 2, 2, 96, 192, dtype=torch.bfloat16, device="cuda")
    bounds = torch.tensor([0, 100, 256], device="cuda")
    backend = explain(*inputs).backend
    eager = gated_delta_rule(*inputs, cu_seqlens=bounds, backend=backend)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gated_delta_rule(*inputs, cu_seqlens=bounds, backend=backend)[0]
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("bounds", [None, [0, 1, 1, 3, 700, 1500]])
def test_conv_gates(bounds):
    dims = dict(num_key_heads=2, num_value_heads=4, key_head_dim=96, value_head_dim=192, return_gate=True)
    cu = None if bounds is None else torch.tensor(bounds, device="cuda")
    inputs = packed_inputs(1500, 1, 2, 4, 96, 192, dtype=torch.bfloat16, device="cuda")

    def run(inputs, backend):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        results = conv_gates(*leaves, cu_seqlens=cu, backend=backend, **dims)
        generator = torch.Generator().manual_seed(7)
        given = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) for x in results]
        return (*results, *torch.autograd.grad(results, leaves, given))

    ours, again, exact = run(inputs, "triton"), run(inputs, "triton"), run([x.double() for x in inputs], "torch")
    for x, y, z in zip(ours, again, exact):
        assert torch.equal(x, y)
        assert relative_error(x, z) < 4e-3


def test_gated_rmsnorm():
    o = torch.randn(2, 300, 3, 192, device="cuda", dtype=torch.bfloat16)
    packed = torch.randn(300, 2, 1000, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(192, device="cuda", dtype=torch.bfloat16)

    def run(inputs, backend):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = gated_rmsnorm(leaves[0], leaves[1][..., 5:581], leaves[2], 1e-5, backend=backend)
        generator = torch.Generator().manual_seed(7)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
        return (y, *torch.autograd.grad(y, leaves, dy))

    ours, exact = run([o, packed, weight], "triton"), run([x.double() for x in (o, packed, weight)], "torch")
    for x, z in zip(ours, exact):
        assert relative_error(x, z) < 5e-3
