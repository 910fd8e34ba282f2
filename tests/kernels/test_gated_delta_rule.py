"""The chunked torch form against the fp64 recurrence, transformers' functions, and gradcheck."""

import pytest
import torch

from hybrid_kernels.gated_delta_rule import explain, gated_delta_rule
from hybrid_kernels.gated_delta_rule.reference import gated_delta_rule_recurrent, gated_delta_rule_torch
from hybrid_kernels.testing import delta_rule_inputs, random_positions, relative_error


def gradients(rule, inputs, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, state = rule(*leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(7)
    do, dstate = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, state))
    return (o, state, *torch.autograd.grad([o, state], leaves, [do, dstate]))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_chunked_is_the_recurrence_in_fp64(length, key_heads):
    inputs = delta_rule_inputs(2, length, key_heads, 2, 8, 12, dtype=torch.float64)
    initial = torch.randn(2, 2, 8, 12, dtype=torch.float64)
    for ours, oracle in zip(
        gradients(gated_delta_rule_torch, inputs, initial_state=initial),
        gradients(gated_delta_rule_recurrent, inputs, initial_state=initial),
    ):
        assert relative_error(ours, oracle) < 1e-9


@pytest.mark.parametrize("gate", [0.0, -1e-3, -50.0])
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("beta", [None, 1.99])
def test_fp32_stays_near_the_recurrence_where_it_is_hard(gate, cosine, beta):
    inputs = delta_rule_inputs(1, 96, 1, 1, 16, 16, gate=gate, cosine=cosine, beta=beta)
    oracle = gradients(gated_delta_rule_recurrent, [x.double() for x in inputs])
    for ours, exact in zip(gradients(gated_delta_rule_torch, inputs), oracle):
        assert torch.isfinite(ours).all()
        assert relative_error(ours, exact, floor=1e-2) < 2e-4


def test_packed_sequences_are_separate():
    bounds = torch.tensor([0, 5, 5, 6, 80, 100])
    inputs = delta_rule_inputs(1, 100, 1, 2, 8, 8, dtype=torch.float64)
    initial = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    o, final = gated_delta_rule(
        *inputs, cu_seqlens=bounds, initial_state=initial, output_final_state=True, backend="torch"
    )
    for i, (start, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        if end == start:
            assert torch.equal(final[i], initial[i])
            continue
        o_i, final_i = gated_delta_rule_recurrent(
            *(x[:, start:end] for x in inputs), initial_state=initial[i : i + 1], output_final_state=True
        )
        assert relative_error(o[:, start:end], o_i) < 1e-10
        assert relative_error(final[i : i + 1], final_i) < 1e-10


@pytest.mark.parametrize("length, seed", [(1, 0), (64, 3), (130, 5), (130, 8)])
def test_chunked_is_the_recurrence_with_documents(length, seed):
    inputs = delta_rule_inputs(4, length, 1, 2, 8, 12, dtype=torch.float64)
    options = dict(
        initial_state=torch.randn(4, 2, 8, 12, dtype=torch.float64),
        positions_bs=random_positions(4, length, seed=seed),
    )
    for ours, oracle in zip(
        gradients(gated_delta_rule_torch, inputs, **options), gradients(gated_delta_rule_recurrent, inputs, **options)
    ):
        assert relative_error(ours, oracle) < 1e-11


def test_documents_are_separate_sequences():
    """The initial state reaches the document that began before the row, and the final state is that of the last."""
    positions = torch.cat([torch.arange(7, 12), torch.arange(1), torch.arange(74), torch.arange(20)]).int()[None]
    inputs, initial = delta_rule_inputs(1, 100, 1, 2, 8, 8, dtype=torch.float64), torch.randn(1, 2, 8, 8).double()
    options = dict(initial_state=initial, output_final_state=True)
    o, final = gated_delta_rule(*inputs, positions_bs=positions, backend="torch", **options)
    bounds = [0, 5, 6, 80, 100]
    for start, end in zip(bounds[:-1], bounds[1:]):
        own = dict(options, initial_state=initial if start == 0 else None)
        o_i, final_i = gated_delta_rule_recurrent(*(x[:, start:end] for x in inputs), **own)
        assert relative_error(o[:, start:end], o_i) < 1e-12
    assert relative_error(final, final_i) < 1e-12


def test_agrees_with_transformers():
    olmo = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    inputs = delta_rule_inputs(2, 100, 1, 3, 16, 24)
    ours, final = gated_delta_rule(*inputs, output_final_state=True)
    for theirs in (olmo.torch_chunk_gated_delta_rule, olmo.torch_recurrent_gated_delta_rule):
        q, k, v, g, beta = inputs
        o, state = theirs(q, k, v, g=g, beta=beta, output_final_state=True)
        assert relative_error(ours, o) < 1e-5
        assert relative_error(final, state) < 1e-5


def test_gradcheck():
    inputs = [x.requires_grad_() for x in delta_rule_inputs(1, 5, 1, 2, 3, 2, dtype=torch.float64)]
    initial = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True), (*inputs, initial)
    )


def test_bitwise_the_same_twice():
    inputs = delta_rule_inputs(1, 200, 1, 2, 24, 48, dtype=torch.bfloat16)
    for first, second in zip(gradients(gated_delta_rule_torch, inputs), gradients(gated_delta_rule_torch, inputs)):
        assert torch.equal(first, second)


def test_dispatch_explains_and_refuses():
    inputs = delta_rule_inputs(1, 4, 1, 1, 4, 4)
    choice = explain(*inputs)
    assert choice.backend == "torch" and "fla" in choice.rejected
    with pytest.raises(ValueError, match="not on a CUDA device"):
        gated_delta_rule(*inputs, backend="fla")
    with pytest.raises(ValueError, match="does not exist"):
        gated_delta_rule(*inputs, backend="cutlass")
    positions = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="positions_bs: it cannot be combined with cu_seqlens"):
        gated_delta_rule(*inputs, positions_bs=positions, cu_seqlens=torch.tensor([0, 4]))
    for bounds in ([0, 3], [1, 4]):
        with pytest.raises(RuntimeError, match="cu_seqlens: the sequences do not cover the row of 4 tokens"):
            gated_delta_rule(*inputs, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match="positions_bs: expected int32"):
        gated_delta_rule(*inputs, positions_bs=positions[:, :3])
    with pytest.raises(ValueError, match="initial_state"):
        gated_delta_rule(*inputs, initial_state=torch.zeros(1))
