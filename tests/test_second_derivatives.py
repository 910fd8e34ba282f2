"""Second derivatives: an autograd function whose backward pass is not differentiable must refuse them."""

import ast
from pathlib import Path

import pytest
import torch

from megatron_hybrid.mixers.recompute import between_linears

ROOT = Path(__file__).resolve().parent.parent
DIFFERENTIABLE = {
    "kernels/hybrid_kernels/linear_cross_entropy/reference.py: _SumOverRanks",  # returns its gradient as it is
    "megatron_hybrid/distributed/context_parallel.py: _AllToAll",  # applies itself
    "megatron_hybrid/model/output_layer.py: _GradientIsInMainGrad",  # returns a gradient that nobody reads
}


def test_every_function_is_differentiable_twice_or_refuses_to_be():
    found = set()
    for path in [*(ROOT / "megatron_hybrid").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef) or "torch.autograd.Function" not in map(ast.unparse, node.bases):
                continue
            (backward,) = (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "backward")
            if "once_differentiable" not in map(ast.unparse, backward.decorator_list):
                found.add(f"{path.relative_to(ROOT)}: {node.name}")
    assert found == DIFFERENTIABLE


@pytest.mark.parametrize("recompute", [False, True])
def test_recompute_refuses_a_second_derivative(recompute):
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    x = torch.arange(3.0, dtype=torch.float64).requires_grad_()
    y, _ = between_linears(torch.exp, x * 1.0, lambda middle: (middle @ weight, None), recompute)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    if not recompute:
        torch.testing.assert_close(torch.autograd.grad(gradient.sum(), x)[0], x.detach().exp())
        return
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
