"""The scans and `gradients` in CUDA C++ on the CPU (kernels_on_cpu.py) against the recurrence in fp64.

With documents, packed sequences, segments and transitions.
"""

import pytest
import torch

pytest.importorskip("triton")
from hybrid_kernels.gated_delta_rule.backends.cuda import op  # noqa: E402
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks  # noqa: E402
from hybrid_kernels.gated_delta_rule.reference import (  # noqa: E402
    final_state_and_transition,
    gated_delta_rule_recurrent,
)
from hybrid_kernels.testing import delta_rule_inputs, random_positions, relative_error  # noqa: E402
from tests.kernels.cuda_sources import shared_builds  # noqa: E402
from tests.kernels.kernels_on_cpu import calls_on_cpu  # noqa: E402

TOLERANCE = 6e-3  # those of tests/gpu/test_kernels.py
TOLERANCES = dict(dq=8e-3, dk=8e-3, dg=2e-2, dbeta=2e-2)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return calls_on_cpu(shared_builds(tmp_path_factory))


@pytest.fixture(autouse=True)
def calls(on_cpu, monkeypatch):
    monkeypatch.setattr(op, "_call", on_cpu)


def drawn(key_dim, length=100, value_dim=64, batch=1, **options):
    options = dict(gate=-1e-2) | options
    return delta_rule_inputs(batch, length, 1, 2, key_dim, value_dim, dtype=torch.bfloat16, **options)


def check_gradients(inputs, do, scores, dv, states, dstates, exact, chunks, varlen=False):
    """Compare dq, dk, dg and dbeta with `exact`. A second run gives the same bits."""
    q, k, _, g, beta = inputs
    found, again = (
        op.gradients(q, k, g, beta, do, dv, scores.G, *states, dstates, 0.1, chunks, varlen) for _ in range(2)
    )
    for (name, tolerance), x, y, truth in zip(TOLERANCES.items(), found, again, exact, strict=True):
        assert relative_error(x, truth, floor=1e-2) < tolerance, name
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    "key_dim, bounds, seed",
    [
        (96, None, None),
        (96, [0, 1, 1, 65, 100], None),
        (64, None, None),
        (128, [0, 30, 100], None),
        (96, None, 8),
        (96, None, 5),
        (64, None, 3),
    ],
)
def test_outputs_states_and_their_gradients(key_dim, bounds, seed):
    """`bounds`: of packed sequences. `seed`: of the documents in the row."""
    q, k, v, g, beta = inputs = drawn(key_dim)
    cu = None if bounds is None else torch.tensor(bounds)
    torch.manual_seed(0)
    initial = torch.randn(1 if bounds is None else len(bounds) - 1, 2, key_dim, 64)
    leaves = [x.double().requires_grad_() for x in (*inputs, initial)]
    positions = None if seed is None else random_positions(1, 100, seed=seed)
    options = dict(scale=0.1, initial_state=leaves[5], output_final_state=True, cu_seqlens=cu, positions_bs=positions)
    exact = gated_delta_rule_recurrent(*leaves[:5], **options)
    do, dfinal = v.roll(1, 1), initial.roll(1, 2)
    dq, dk, *of_values, dg, dbeta, of_initial = torch.autograd.grad(exact, leaves, (do.double(), dfinal.double()))
    exact += (*of_values, of_initial)

    chunks = Chunks.of(v, cu, positions=positions)
    scores = op.prepare(q, k, g, beta, 0.1, chunks, cu is not None)
    rest = (cu, 0.1, chunks)
    o, final, _ = op.forward_scan(q, k, v, scores, initial, *rest, output=True, final=True)
    both = op.forward_scan(q, k, v, scores, initial, *rest, output=True, states=True)
    states = op.forward_scan(q, k, v, scores, initial, *rest, states=True)[2]
    dv, dstates, dinitial = op.reverse_scan(q, k, do, scores, dfinal, *rest, initial=True)
    for name, x, y in zip(("o", "final", "dv", "dinitial"), (o, final, dv, dinitial), exact, strict=True):
        assert relative_error(x, y) < TOLERANCE, name
    assert torch.equal(o, both[0])
    count = int(chunks.first[-1]) if bounds else chunks.count
    assert all(torch.equal(x[:count], y[:count]) for x, y in zip(states, both[2], strict=True))
    check_gradients(inputs, do, scores, dv, states, dstates, (dq, dk, dg, dbeta), chunks, cu is not None)


@pytest.mark.parametrize(
    "key_dim, value_dim, batch, length, options",
    [
        (96, 192, 1, 130, {}),
        (96, 128, 2, 40, {}),
        (128, 128, 1, 64, {}),
        (64, 64, 1, 300, {}),
        (64, 320, 1, 130, {}),
        (96, 64, 1, 64, dict(beta=0.0)),
        (96, 64, 1, 64, dict(gate=-50.0)),
        (96, 64, 3, 70, dict(seed=2)),
    ],
    ids=str,
)
def test_gradients(key_dim, value_dim, batch, length, options):
    """Several value tiles, and more chunks than a block's rings hold. The two blocks take turns with the chunks."""
    q, k, v, g, beta = inputs = drawn(key_dim, length, value_dim, batch, **options)
    positions = random_positions(batch, length, seed=options["seed"]) if "seed" in options else None
    leaves, do = [x.double().requires_grad_() for x in inputs], v.roll(1, 1)
    o, _ = gated_delta_rule_recurrent(*leaves, scale=0.1, positions_bs=positions)
    dq, dk, _, dg, dbeta = torch.autograd.grad(o, leaves, do.double())
    chunks = Chunks.of(v, None, positions=positions)
    scores = op.prepare(q, k, g, beta, 0.1, chunks, False)
    states = op.forward_scan(q, k, v, scores, None, None, 0.1, chunks, states=True)[2]
    dv, dstates, _ = op.reverse_scan(q, k, do, scores, None, None, 0.1, chunks)
    check_gradients(inputs, do, scores, dv, states, dstates, (dq, dk, dg, dbeta), chunks)


@pytest.mark.parametrize(
    "key_dim, segments, seed", [(96, 1, None), (96, 2, None), (64, 1, None), (128, 1, None), (96, 2, 1), (64, 2, 5)]
)
def test_transitions(key_dim, segments, seed):
    """The final state and transition of each segment; its gradient of the initial state, without outputs."""
    q, k, v, g, beta = drawn(key_dim, length=100)
    positions = None if seed is None else random_positions(1, 100, seed=seed)
    chunks, do = Chunks.of(v, None, segments, positions), v.roll(1, 1)
    scores = op.prepare(q, k, g, beta, 0.1, chunks, False)
    ends = op.forward_scan(q, k, v, scores, None, None, 0.1, chunks, final=True, transition=True)[1]
    outputs = op.reverse_scan(q, k, do, scores, None, None, 0.1, chunks, output=False, initial=True)
    assert outputs[:2] == (None, None)
    for i in range(segments):
        part = slice(64 * i, 64 * (i + 1) if i + 1 < segments else None)
        own = [x[:, part].double() for x in (q, k, v, g, beta)]
        here = None if seed is None else positions[:, part]
        exact = final_state_and_transition(*own[1:], here)
        assert relative_error(ends[i : i + 1, ..., : 64 + key_dim], exact) < TOLERANCE
        initial = torch.zeros(1, 2, key_dim, 64, dtype=torch.float64, requires_grad=True)
        o, _ = gated_delta_rule_recurrent(*own, scale=0.1, initial_state=initial, positions_bs=here)
        (truth,) = torch.autograd.grad(o, initial, do[:, part].double())
        assert relative_error(outputs[2][i : i + 1], truth) < TOLERANCE
