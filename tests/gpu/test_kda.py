"""Kimi Delta Attention on the GPU in bf16: its ops against fp64 oracles, and the mixer against fla's own layer."""

import pytest
import torch

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.gated_delta_rule.reference import gated_delta_rule_recurrent
from hybrid_kernels.gated_delta_step import gated_delta_step
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from hybrid_kernels.kda_rule import final_state_and_transition, kda_rule
from hybrid_kernels.testing import kda_inputs, packed_inputs, random_positions, relative_error

pytestmark = pytest.mark.timeout(600)
TOLERANCES = dict(
    o=6e-3, final=6e-3, dq=1e-2, dk=1e-2, dv=1e-2, dg=2e-2, dbeta=2e-2, dA_log=2e-2, ddt_bias=2e-2, dinitial=1e-2
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def results_and_gradients(fn, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = [x for x in fn(*leaves) if x is not None]
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) for x in results]
    return (*results, *torch.autograd.grad(results, leaves, given))


def agree(fn, inputs, tolerances):
    """Compare fn(backend) with fp64 on plain torch, result by result."""
    try:
        ours = results_and_gradients(fn("fast"), inputs)
    except ValueError as error:
        pytest.skip(str(error))
    exact = results_and_gradients(fn("torch"), [x.double() for x in inputs])
    for x, oracle, (name, tolerance) in zip(ours, exact, tolerances.items(), strict=True):
        assert torch.isfinite(x).all(), name
        assert relative_error(x, oracle, floor=1e-2) < tolerance, name


def rule_inputs(batch, length, key_heads, heads, key_dim, value_dim):
    """Draw q, k, v, the projection of the decay, beta, A_log and dt_bias."""
    sizes = (batch, length, key_heads, heads, key_dim, value_dim)
    q, k, v, g, beta = kda_inputs(*sizes, dtype=torch.bfloat16, device="cuda")
    raw = torch.randn(g.shape, device="cuda", dtype=torch.bfloat16)
    A_log, dt_bias = torch.rand(heads, device="cuda"), torch.randn(heads * key_dim, device="cuda") - 4
    return [q, k, v, raw, beta, A_log, dt_bias]


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize(
    "batch, length, key_dim, value_dim", [(2, 64, 128, 128), (2, 1000, 128, 128), (1, 300, 64, 128)]
)
def test_the_rule_by_fla(batch, length, key_dim, value_dim, lower_bound):
    inputs = [*rule_inputs(batch, length, 2, 2, key_dim, value_dim), torch.randn(batch, 2, key_dim, value_dim).cuda()]

    def of(backend):
        options = dict(
            backend="torch" if backend == "torch" else "fla", lower_bound=lower_bound, output_final_state=True
        )
        return lambda *x: kda_rule(*x[:5], A_log=x[5], dt_bias=x[6], initial_state=x[7], **options)

    agree(of, inputs, TOLERANCES)


def test_documents_by_fla():
    """Rows of documents, as bounds of all rows with empty documents at the end."""
    lengths = [[1, 63, 64, 500, 372], [1000]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).int().cuda()
    bounds = torch.tensor([0, *(n for row in lengths for n in row), 0, 0]).cumsum(0).int().cuda()
    inputs = rule_inputs(2, 1000, 2, 2, 128, 128)

    def of(backend):
        options = dict(backend="torch" if backend == "torch" else "fla", positions_bs=positions, cu_seqlens=bounds)
        return lambda *x: kda_rule(*x[:5], A_log=x[5], dt_bias=x[6], **options)

    agree(of, inputs, {name: bound for name, bound in TOLERANCES.items() if name not in ("final", "dinitial")})


def test_the_transition_of_a_slice_by_fla():
    """Context parallelism finds it by a call with a state, and values, as wide as values and keys."""
    _, k, v, raw, beta, A_log, dt_bias = rule_inputs(2, 500, 2, 2, 128, 128)
    gate = dict(A_log=A_log, dt_bias=dt_bias)
    try:
        ours = final_state_and_transition(k, v, raw, beta, **gate, backend="fla")
    except ValueError as error:
        pytest.skip(str(error))
    exact = (x.double() for x in (k, v, raw, beta))
    oracle = final_state_and_transition(*exact, **{n: x.double() for n, x in gate.items()}, backend="torch")
    for x, y in zip(ours.split(128, -1), oracle.split(128, -1), strict=True):
        assert relative_error(x, y, floor=1e-3) < 1e-2


@pytest.mark.parametrize("batch, seed", [(1, None), (1, 8), (4, 3)])
def test_conv_gates_without_a_decay(batch, seed):
    positions = None if seed is None else random_positions(batch, 1500, seed=seed, device="cuda")
    packed, weight, *_ = packed_inputs(1500, batch, 4, 4, 128, 128, dtype=torch.bfloat16, device="cuda")
    sizes = dict(num_key_heads=4, num_value_heads=4, key_head_dim=128, value_head_dim=128, gate_width=256)
    options = dict(return_gate=True, positions_bs=positions, allow_negative_eigenvalues=False)

    def of(backend):
        name = "torch" if backend == "torch" else "triton"
        return lambda x, w: conv_gates(x, w, None, None, **sizes, **options, backend=name)

    agree(of, [packed, weight], dict.fromkeys(("q", "k", "v", "beta", "gate", "dpacked", "dweight"), 4e-3))


def test_gated_rmsnorm_by_a_sigmoid():
    o, gate, weight = (
        torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((2, 300, 3, 128), (300, 2, 384), (128,))
    )

    def of(backend):
        options = dict(activation="sigmoid", backend="torch" if backend == "torch" else "triton")
        return lambda *x: (gated_rmsnorm(*x, 1e-5, **options),)

    agree(of, [o, gate, weight], dict.fromkeys(("y", "do", "dgate", "dweight"), 5e-3))


def test_a_step():
    inputs = kda_inputs(3, 4, 2, 2, 128, 128, dtype=torch.bfloat16, device="cuda")
    start = torch.randn(3, 2, 128, 128, device="cuda")
    exact = [x.double() for x in inputs]
    expected, final = gated_delta_rule_recurrent(*exact, initial_state=start.double(), output_final_state=True)
    state = start.clone()
    o = torch.stack([gated_delta_step(*(x[:, t] for x in inputs), state, backend="triton") for t in range(4)], 1)
    assert relative_error(o, expected) < 4e-3 and relative_error(state, final) < 1e-4


def test_the_mixer_agrees_with_flas_layer():
    pytest.importorskip("fla")
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from testing.kda_layer import KIMI_LINEAR, build

    ours, theirs = build(KIMI_LINEAR, dict(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear))
    x = torch.randn(1000, 2, KIMI_LINEAR["hidden_size"], device="cuda", dtype=torch.bfloat16)
    of_ours = results_and_gradients(lambda x: (ours(x, None)[0],), [x])
    of_theirs = results_and_gradients(lambda x: (theirs(x.transpose(0, 1))[0].transpose(0, 1),), [x])
    for mine, their in zip(of_ours, of_theirs, strict=True):
        assert their.any() and relative_error(mine, their) < 2e-2
