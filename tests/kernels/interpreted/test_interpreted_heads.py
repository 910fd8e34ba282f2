"""head_norm_rope's and sigmoid_gate's Triton kernels under the interpreter, against plain torch in fp64."""

import pytest
import torch

from hybrid_kernels.head_norm_rope import explain, head_norm_rope
from hybrid_kernels.sigmoid_gate import sigmoid_gate
from hybrid_kernels.testing import relative_error
from tests.kernels.test_head_norm_rope import head_inputs


def gradients(inputs, *, layout=None, **options):
    """Return results and gradients. `layout`: memory order of the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    results = [x for x in head_norm_rope(*leaves, inputs[3], eps=1e-6, **options) if x is not None]
    given = [x.detach().cos() for x in results]
    if layout is not None:
        order = torch.tensor(layout).argsort().tolist()
        given[:3] = [g.permute(layout).contiguous().permute(order) for g in given[:3]]
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, given))]


def agree(ours, oracle, tolerance):
    for mine, theirs in zip(ours, oracle, strict=True):
        assert torch.isfinite(mine).all()
        assert relative_error(mine, theirs) < tolerance


@pytest.mark.parametrize(
    "heads, groups, dim, turned, gated, layout",
    [
        (6, 2, 16, 4, True, None),
        (6, 2, 16, 4, True, (1, 2, 0, 3)),
        (5, 5, 12, 12, False, (1, 2, 0, 3)),
        (2, 1, 32, 8, True, None),
        (3, 1, 16, 0, True, (1, 2, 0, 3)),
    ],
)
def test_against_fp64(heads, groups, dim, turned, gated, layout):
    inputs = head_inputs(5, 2, heads, groups, dim, turned, gated)
    options = dict(num_heads=heads, num_groups=groups, gated=gated)
    exact = [x.double() for x in inputs[:3]] + [inputs[3]]
    ours = gradients(inputs, layout=layout, backend="triton", **options)
    agree(ours, gradients(exact, layout=layout, backend="torch", **options), 1e-5)


def test_several_tokens_a_program_and_angles_of_each_sequence(monkeypatch):
    from hybrid_kernels.head_norm_rope.backends.triton import op

    monkeypatch.setattr(op, "BACKWARD_PROGRAMS", 3)
    *inputs, angles = head_inputs(7, 3, 6, 2, 16, 8, True)
    angles = torch.cat([angles, angles.flip(0), 2 * angles], 1)
    options = dict(num_heads=6, num_groups=2, gated=True)
    exact = gradients([x.double() for x in inputs] + [angles], backend="torch", **options)
    agree(gradients([*inputs, angles], backend="triton", **options), exact, 1e-5)


def test_in_bf16_twice():
    inputs = head_inputs(9, 1, 6, 2, 16, 4, True, torch.bfloat16)
    options = dict(num_heads=6, num_groups=2, gated=True)
    assert explain(*inputs).backend == "triton"
    ours, again = gradients(inputs, **options), gradients(inputs, **options)
    assert all(torch.equal(x, y) and x.dtype == torch.bfloat16 for x, y in zip(ours, again))
    exact = gradients([x.double() for x in inputs[:3]] + [inputs[3]], backend="torch", **options)
    agree(ours[:4], exact[:4], 5e-3)  # the interpreter cuts off where the GPU rounds


@pytest.mark.parametrize("width", [24, 2100])
def test_sigmoid_gate(width):
    x, packed = torch.randn(5, 2, width), torch.randn(5, 2, 2 * width)
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = [x.to(dtype).requires_grad_(), packed.to(dtype).requires_grad_()]
        y = sigmoid_gate(leaves[0], leaves[1][..., width:], backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, y.detach().cos())])
    agree(*results, 1e-5)
