"""Triton kernels in fp32 under the interpreter, forward and every gradient, against fp64 oracles."""

import pytest
import torch

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.gated_delta_rule import explain, gated_delta_rule
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from hybrid_kernels.testing import delta_rule_inputs, packed_inputs, random_positions, relative_error


def gradients(fn, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = fn(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    return (*results, *torch.autograd.grad(results, leaves, given))


def agree(fn, inputs, tolerance):
    """Compare every result and gradient of fn("triton") with those of fn("torch") in fp64."""
    exact = gradients(fn("torch"), [x.double() for x in inputs])
    for ours, oracle in zip(gradients(fn("triton"), inputs), exact):
        assert torch.isfinite(ours).all()
        assert relative_error(ours, oracle, floor=1e-2) < tolerance


@pytest.fixture
def small_segments(monkeypatch):
    """Make programs of conv_gates iterate over few tokens, because the interpreter is slow."""
    from hybrid_kernels.conv_gates.backends.triton import op

    for name, size in (("SEGMENTS", 16), ("FORWARD_SEGMENT", 4), ("BACKWARD_SEGMENT", 4)):
        monkeypatch.setattr(op, name, size)


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


def test_gated_delta_rule_of_packed_sequences():
    bounds = torch.tensor([0, 1, 1, 66, 80])
    inputs = delta_rule_inputs(1, 80, 1, 1, 32, 64)
    agree(delta_rule(cu_seqlens=bounds), [*inputs, torch.randn(4, 1, 32, 64)], 2e-5)


def in_segments(segments, monkeypatch):
    from hybrid_kernels.gated_delta_rule.backends.triton import op

    monkeypatch.setattr(op, "segments_of", lambda *_: segments)


@pytest.mark.parametrize(
    "batch, length, key_dim, segments, seed, save",
    [
        (3, 70, 16, 1, 5, "scores"),
        (2, 100, 32, 1, 0, "inputs"),
        (2, 140, 16, 2, 3, "states"),
        (1, 64, 96, 1, 2, "scores"),
    ],
)
def test_gated_delta_rule_of_documents(batch, length, key_dim, segments, seed, save, monkeypatch):
    in_segments(segments, monkeypatch)
    positions = random_positions(batch, length, seed=seed)
    inputs = [*delta_rule_inputs(batch, length, 1, 1, key_dim, 64, gate=-1e-2), torch.randn(batch, 1, key_dim, 64)]
    agree(delta_rule(save=save, positions_bs=positions), inputs, 2e-5)
    dg = gradients(delta_rule(save=save, positions_bs=positions)("triton"), inputs)[5]
    assert not dg[positions == 0].any(), "there is no state to decay"


@pytest.mark.parametrize("segments", [1, 2])
def test_nothing_crosses_a_boundary(segments, monkeypatch):
    """Change everything on one side of a boundary: no bit on the other side changes, not even in a gradient."""
    in_segments(segments, monkeypatch)
    inputs, others = (delta_rule_inputs(1, 100, 1, 1, 16, 64, gate=-1e-3, seed=seed) for seed in (0, 1))
    positions, initial = torch.cat([torch.arange(30, 60), torch.arange(70)]).int()[None], torch.randn(1, 1, 16, 64)
    fn = delta_rule(positions_bs=positions)("triton")
    both = gradients(fn, [*inputs, initial])
    before, after = slice(0, 30), slice(30, None)
    for same, changed in ((before, after), (after, before)):
        mixed = [x.clone() for x in inputs]
        for x, y in zip(mixed, others):
            x[:, changed] = y[:, changed]
        found = gradients(fn, [*mixed, initial])
        for x, y in zip((both[0], *both[2:7]), (found[0], *found[2:7])):
            assert torch.equal(x[:, same], y[:, same])
        own = 7 if same is before else 1  # the initial state belongs to the first document, the final one to the last
        assert torch.equal(both[own], found[own])


@pytest.mark.parametrize("batch, length, segments, save", [(2, 100, 2, "scores"), (1, 180, 3, "inputs")])
def test_gated_delta_rule_in_segments(batch, length, segments, save, monkeypatch):
    in_segments(segments, monkeypatch)
    inputs = delta_rule_inputs(batch, length, 1, 1, 96 if batch == 1 else 16, 64, gate=-1e-2)
    agree(delta_rule(save=save), [*inputs, torch.randn(batch, 1, inputs[0].shape[3], 64)], 2e-5)


def test_segments_that_pay():
    from hybrid_kernels.gated_delta_rule.backends.triton.join import segments_that_pay

    assert segments_that_pay(tiles=90, chunks=128, processors=132) == 1  # 30 heads: the GPU is full enough
    assert segments_that_pay(tiles=45, chunks=128, processors=132) == 5  # 3 would be two rounds, for 135 programs
    assert segments_that_pay(tiles=24, chunks=128, processors=132) == 5  # one round
    assert segments_that_pay(tiles=45, chunks=31, processors=132) == 1  # a segment would be too short
    assert segments_that_pay(tiles=24, chunks=128, processors=0) == 1
    for chunks in range(48, 300):
        count = segments_that_pay(24, chunks, 132)
        assert (count - 1) * -(-chunks // count) < chunks  # no segment is empty


@pytest.mark.parametrize("hard", [dict(gate=0.0), dict(gate=-1e-3)])
def test_keys_all_alike_do_not_diverge(hard):
    """With A in bf16 they would: its rounding errors add up while the entries themselves cancel."""
    inputs = delta_rule_inputs(1, 1024, 1, 1, 32, 64, beta=1.99, cosine=1.0, dtype=torch.bfloat16, **hard)
    o, _ = gated_delta_rule(*inputs, backend="triton")
    exact, _ = gated_delta_rule(*(x.double() for x in inputs), backend="torch")
    assert relative_error(o, exact) < 0.5


@pytest.mark.parametrize("documents, segments", [(False, 1), (True, 2)])
def test_compiled_without_a_break(documents, segments, small_segments, monkeypatch):
    """Every op, and its backward pass, is one operator for torch.compile."""
    in_segments(segments, monkeypatch)
    length = 34 if segments == 1 else 70
    dims = dict(num_key_heads=1, num_value_heads=1, key_head_dim=16, value_head_dim=64)
    of = dict(positions_bs=random_positions(1, length, seed=3) if documents else None)

    def mixer(packed, conv, A_log, dt_bias, weight):
        q, k, v, g, beta, gate = conv_gates(packed, conv, A_log, dt_bias, return_gate=True, **of, **dims)
        o, final = gated_delta_rule(q, k, v, g, beta, output_final_state=True, **of)
        return gated_rmsnorm(o, gate, weight, 1e-5), final

    inputs = [*packed_inputs(length, 1, 1, 1, 16, 64), torch.randn(64)]
    plain, compiled = (
        gradients(mixer, inputs),
        gradients(torch.compile(mixer, fullgraph=True, backend="aot_eager"), inputs),
    )
    for x, y in zip(plain, compiled):
        assert torch.equal(x, y)


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


@pytest.mark.parametrize("documents, dim", [(False, 96), (False, 128), (True, 32)])
def test_conv_gates(documents, dim, small_segments):
    batch, length, heads, values = (4, 21, 2, 16) if documents else (2, 37, 1, 64)
    options = dict(num_key_heads=1, num_value_heads=heads, key_head_dim=dim, value_head_dim=values, return_gate=True)
    if documents:
        options["positions_bs"] = random_positions(batch, length, seed=4)
    inputs = packed_inputs(length, batch, 1, heads, dim, values)
    agree(lambda backend: lambda *x: conv_gates(*x, backend=backend, **options), inputs, 1e-5)


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_rmsnorm(activation):
    o, packed, weight = torch.randn(2, 9, 3, 96), torch.randn(9, 2, 300), torch.randn(96)

    def of(backend):
        options = dict(activation=activation, backend=backend)
        return lambda o, packed, weight: gated_rmsnorm(o, packed[..., 5:293], weight, 1e-5, **options)

    agree(of, [o, packed, weight], 1e-5)


@pytest.mark.parametrize("documents", [False, True])
def test_conv_gates_without_a_decay(documents, small_segments):
    """A gate of another width than v, and no a, as in Kimi Delta Attention."""
    batch, length = (4, 21) if documents else (2, 37)
    options = dict(num_key_heads=2, num_value_heads=2, key_head_dim=32, value_head_dim=16, gate_width=48)
    options |= dict(return_gate=True, allow_negative_eigenvalues=False)
    if documents:
        options["positions_bs"] = random_positions(batch, length, seed=4)
    packed, weight, *_ = packed_inputs(length, batch, 2, 2, 32, 16, padding=20)
    agree(lambda backend: lambda x, w: conv_gates(x, w, None, None, backend=backend, **options), [packed, weight], 1e-5)


@pytest.mark.parametrize("with_gate, with_decay", [(True, False), (False, True)])
def test_conv_gates_writes_all_of_its_gradient(with_gate, with_decay, small_segments, monkeypatch):
    """It also writes zeros: in the padding, and in the gate's columns if the gate has no gradient."""
    from hybrid_kernels.conv_gates.backends.triton import op

    width = 256 if with_decay else 96
    dims = [2, 4, 32, 64, width, int(with_decay)]
    inputs = packed_inputs(21, 2, 2, 4, 32, 64, padding=14, dtype=torch.float32)
    inputs[2:] = inputs[2:] if with_decay else (None, None)
    gate = torch.randn(21, 2, 512)[..., 64 : 64 + width] if with_gate else None  # a slice: its rows lie apart
    given = [None if x is None else torch.zeros_like(x) for x in op._forward(*inputs, None, dims, 2.0)]
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: empty_like(x, **options).fill_(float("nan")))
    found = op._backward(*inputs, None, *given, gate, dims, 2.0)[0]
    expected = torch.zeros_like(found)
    if with_gate:
        expected[..., 2 * 64 + 256 : 2 * 64 + 256 + width] = gate
    assert torch.equal(found, expected)
