"""The CUDA backend as it runs on Hopper: its kernels on the CPU (kernels_on_cpu.py), and Triton's `join` and `gradients`."""

from unittest.mock import Mock

import pytest
import torch

from hybrid_kernels.gated_delta_rule import gated_delta_rule, passes
from hybrid_kernels.gated_delta_rule.backends.cuda import op as cuda_op
from hybrid_kernels.gated_delta_rule.kernels import Kernels
from hybrid_kernels.testing import delta_rule_inputs, random_positions, relative_error
from tests.kernels.kernels_on_cpu import calls_on_cpu


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return calls_on_cpu(tmp_path_factory.mktemp("kernels"))


def results(inputs, given, backend, save="scores", bounds=None, positions=None):
    """Return o, the final state and all gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    *tokens, initial = leaves
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    out = gated_delta_rule(
        *tokens,
        initial_state=initial,
        output_final_state=True,
        save=save,
        backend=backend,
        scale=0.1,
        cu_seqlens=cu_seqlens,
        positions_bs=positions,
    )
    return (*out, *torch.autograd.grad(out, leaves, [x.to(y.dtype) for x, y in zip(given, out, strict=True)]))


@pytest.mark.parametrize(
    "length, heads, save, segments, documents, tolerance, hard",
    [
        (100, 2, "scores", 1, None, 0.02, {}),
        (63, 1, "inputs", 1, None, 0.02, dict(beta=0.0)),
        (70, 1, "states", 1, None, 0.3, dict(beta=1.99, cosine=1.0, gate=-1e-3)),
        (64, 1, "scores", 1, None, 0.02, dict(gate=-50.0)),
        (110, 1, "scores", 1, [0, 1, 1, 66, 110], 0.02, dict(gate=-1e-2)),
        (100, 1, "inputs", 1, [0, 30, 100], 0.02, dict(gate=-1e-2)),
        (180, 1, "scores", 3, None, 0.02, dict(gate=-1e-2)),
        (100, 1, "scores", 1, 8, 0.02, dict(gate=-1e-2)),
        (180, 1, "inputs", 3, 3, 0.02, dict(gate=-1e-2)),
    ],
    ids=str,
)
def test_results_and_gradients(length, heads, save, segments, documents, tolerance, hard, on_cpu, monkeypatch):
    """Compare with fp64, within the tolerance of dg in tests/gpu/test_kernels.py: A is in fp16 and the rest in bf16.

    `documents`: bounds of packed sequences, or the seed of documents in the row.
    """
    torch.manual_seed(0)
    bounds = documents if isinstance(documents, list) else None
    positions = random_positions(1, length, seed=documents) if isinstance(documents, int) else None
    inputs = delta_rule_inputs(1, length, 1, heads, 96, 64, dtype=torch.bfloat16, **hard)
    shape = (1 if bounds is None else len(bounds) - 1, heads, 96, 64)
    inputs.append(torch.randn(shape))
    given = [torch.randn(1, length, heads, 64, dtype=torch.bfloat16), torch.randn(shape)]
    exact = results([x.double() for x in inputs], given, "torch", bounds=bounds, positions=positions)

    call = Mock(wraps=on_cpu)
    monkeypatch.setattr(cuda_op, "_call", call)
    monkeypatch.setattr(passes, "choose_kernels", lambda *_: Kernels(cuda_op, segments))
    ours = results(inputs, given, "triton", save, bounds, positions)
    assert [x.args[0] for x in call.call_args_list].count("prepare") == (2 if save == "inputs" else 1)
    names = ("o", "final", "q", "k", "v", "g", "beta", "initial")
    errors = {name: relative_error(x, y, floor=1e-2) for name, x, y in zip(names, ours, exact, strict=True)}
    assert max(errors.values()) < tolerance, errors
