"""The CUDA backend as it runs on Hopper: its kernels on the CPU (kernels_on_cpu.py), and Triton's `join`. Its `gradients` next to
Triton's.
"""

from unittest.mock import Mock

import pytest
import torch

from hybrid_kernels.gated_delta_rule import gated_delta_rule, passes
from hybrid_kernels.gated_delta_rule.backends.cuda import op as cuda_op
from hybrid_kernels.gated_delta_rule.backends.triton import op as triton_op
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks
from hybrid_kernels.gated_delta_rule.kernels import Kernels
from hybrid_kernels.testing import delta_rule_inputs, random_positions, relative_error
from tests.kernels.cuda_sources import shared_builds
from tests.kernels.kernels_on_cpu import calls_on_cpu


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return calls_on_cpu(shared_builds(tmp_path_factory))


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


@pytest.mark.parametrize(
    "key_dim, value_dim, heads, bounds, seed",
    [
        (96, 192, 1, None, None),
        (96, 64, 2, [0, 1, 1, 65, 100], None),
        (96, 128, 2, None, 8),
        (64, 64, 1, None, 5),
        (128, 128, 1, None, None),
    ],
    ids=str,
)
def test_gradients_are_those_of_triton(key_dim, value_dim, heads, bounds, seed, on_cpu, monkeypatch):
    """The same results of the scans give the same gradients. Triton's run in fp32, because its interpreter truncates to bf16."""
    monkeypatch.setattr(cuda_op, "_call", on_cpu)
    q, k, v, g, beta = delta_rule_inputs(1, 100, 1, heads, key_dim, value_dim, dtype=torch.bfloat16, gate=-1e-2)
    beta = beta.half().float()  # as the kernels in bf16 round it
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    positions = None if seed is None else random_positions(1, 100, seed=seed)
    chunks, do, varlen = Chunks.of(v, cu_seqlens, positions=positions), v.roll(1, 1), bounds is not None
    scores = cuda_op.prepare(q, k, g, beta, 0.1, chunks, varlen)
    rest = (None, cu_seqlens, 0.1, chunks)
    states, new_values = cuda_op.forward_scan(q, k, v, scores, *rest, states=True)[2]
    dv, dstates, _ = cuda_op.reverse_scan(q, k, do, scores, *rest)
    given = (q, k, g, beta, do, dv, scores.G, states, new_values, dstates)
    ours = cuda_op.gradients(*given, 0.1, chunks, varlen)
    theirs = triton_op.gradients(*(x.float() for x in given), 0.1, chunks, varlen)
    errors = [relative_error(x, y) for x, y in zip(ours, theirs, strict=True)]
    assert all(error < most for error, most in zip(errors, (4e-3, 4e-3, 1e-2, 1e-5), strict=True)), errors
