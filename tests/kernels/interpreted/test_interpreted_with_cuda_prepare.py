"""`prepare` in CUDA C++ (here on the CPU) with Triton's scans and gradients, as on Hopper without documents."""

from unittest.mock import Mock

import pytest
import torch

from hybrid_kernels.gated_delta_rule import gated_delta_rule, passes
from hybrid_kernels.gated_delta_rule.backends.cuda import op as cuda_op
from hybrid_kernels.gated_delta_rule.backends.triton import op as triton_op
from hybrid_kernels.gated_delta_rule.kernels import Kernels
from hybrid_kernels.testing import delta_rule_inputs, relative_error
from tests.kernels.prepare_on_cpu import calls_on_cpu


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return calls_on_cpu(tmp_path_factory.mktemp("prepare"))


def results(inputs, given, backend, save="scores"):
    """Return o, the final state and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    *tokens, initial = leaves
    out = gated_delta_rule(
        *tokens, initial_state=initial, output_final_state=True, save=save, backend=backend, scale=0.1
    )
    return (*out, *torch.autograd.grad(out, leaves, [x.to(y.dtype) for x, y in zip(given, out, strict=True)]))


@pytest.mark.parametrize(
    "length, heads, save, tolerance, hard",
    [
        (100, 2, "scores", 0.015, {}),
        (63, 1, "inputs", 0.015, dict(beta=0.0)),
        (70, 1, "states", 0.3, dict(beta=1.99, cosine=1.0, gate=-1e-3)),
        (64, 1, "scores", 0.015, dict(gate=-50.0)),
    ],
    ids=str,
)
def test_results_and_gradients(length, heads, save, tolerance, hard, on_cpu, monkeypatch):
    """Compare with fp64. The errors are those of A in fp16 and the rest in bf16, as with Triton's `prepare`."""
    torch.manual_seed(0)
    inputs = delta_rule_inputs(1, length, 1, heads, 96, 192, dtype=torch.bfloat16, **hard)
    inputs.append(torch.randn(1, heads, 96, 192))
    given = [torch.randn(1, length, heads, 192, dtype=torch.bfloat16), torch.randn(1, heads, 96, 192)]
    exact = results([x.double() for x in inputs], given, "torch")

    call = Mock(wraps=on_cpu)
    monkeypatch.setattr(cuda_op, "_call", call)
    monkeypatch.setattr(passes, "choose_kernels", lambda *_: Kernels(cuda_op, triton_op, triton_op, 1))
    ours = results(inputs, given, "triton", save)
    assert call.call_count == (2 if save == "inputs" else 1)
    names = ("o", "final", "q", "k", "v", "g", "beta", "initial")
    errors = {name: relative_error(x, y, floor=1e-2) for name, x, y in zip(names, ours, exact, strict=True)}
    assert max(errors.values()) < tolerance, errors
