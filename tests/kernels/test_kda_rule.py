"""kda_rule's chunked torch form against the fp64 recurrence, transformers' and the gate's functions, and gradcheck."""

import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hybrid_kernels.gated_delta_rule.reference import gated_delta_rule_torch
from hybrid_kernels.kda_rule import explain, final_state_and_transition, kda_rule
from hybrid_kernels.kda_rule.backends import fla
from hybrid_kernels.kda_rule.reference import kda_rule_recurrent, kda_rule_torch, log_decay
from hybrid_kernels.testing import HARD_CASES, kda_inputs, random_positions, relative_error


def gradients(rule, inputs, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    o, state = rule(*leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(7)
    do, dstate = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, state))
    return (o, state, *torch.autograd.grad([o, state], leaves, [do, dstate]))


def assert_near(found, expected, tolerance):
    for ours, oracle in zip(found, expected, strict=True):
        assert relative_error(ours, oracle) < tolerance


@pytest.mark.parametrize("length", [1, 15, 16, 17, 130])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_chunked_is_the_recurrence_in_fp64(length, key_heads):
    inputs = kda_inputs(2, length, key_heads, 2, 8, 12, dtype=torch.float64)
    options = dict(initial_state=torch.randn(2, 2, 8, 12, dtype=torch.float64))
    assert_near(gradients(kda_rule_torch, inputs, **options), gradients(kda_rule_recurrent, inputs, **options), 1e-12)


@pytest.mark.parametrize("length, seed", [(1, 0), (64, 3), (130, 5), (130, 8)])
def test_chunked_is_the_recurrence_with_documents(length, seed):
    inputs = kda_inputs(4, length, 1, 2, 8, 12, dtype=torch.float64)
    options = dict(initial_state=torch.randn(4, 2, 8, 12, dtype=torch.float64))
    options |= dict(positions_bs=random_positions(4, length, seed=seed))
    assert_near(gradients(kda_rule_torch, inputs, **options), gradients(kda_rule_recurrent, inputs, **options), 1e-12)


@pytest.mark.parametrize("case", HARD_CASES)
def test_fp32_stays_near_the_recurrence_where_it_is_hard(case):
    inputs = kda_inputs(1, 96, 1, 1, 16, 16, **HARD_CASES[case])
    oracle = gradients(kda_rule_recurrent, [x.double() for x in inputs])
    for ours, exact in zip(gradients(kda_rule_torch, inputs), oracle, strict=True):
        assert torch.isfinite(ours).all()
        assert relative_error(ours, exact, floor=1e-2) < 2e-4


def test_one_decay_in_all_channels_is_the_gated_delta_rule():
    q, k, v, g, beta = kda_inputs(2, 70, 1, 2, 8, 12, dtype=torch.float64)
    per_head = g[..., 0]
    ours = kda_rule(q, k, v, per_head.unsqueeze(-1).expand_as(g), beta, output_final_state=True)
    assert_near(ours, gated_delta_rule_torch(q, k, v, per_head, beta, output_final_state=True), 1e-12)


def test_packed_sequences_are_separate():
    bounds = torch.tensor([0, 5, 5, 6, 80, 100])
    inputs = kda_inputs(1, 100, 1, 2, 8, 8, dtype=torch.float64)
    initial = torch.randn(5, 2, 8, 8, dtype=torch.float64)
    o, final = kda_rule(*inputs, cu_seqlens=bounds, initial_state=initial, output_final_state=True)
    for i, (start, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        if end == start:
            assert torch.equal(final[i], initial[i])
            continue
        own = dict(initial_state=initial[i : i + 1], output_final_state=True)
        expected = kda_rule_recurrent(*(x[:, start:end] for x in inputs), **own)
        assert_near((o[:, start:end], final[i : i + 1]), expected, 1e-12)
    positions = torch.cat([torch.arange(n) for n in bounds.diff()]).int()[None]
    assert relative_error(kda_rule(*inputs, positions_bs=positions, cu_seqlens=bounds)[0], kda_rule(
        *inputs, cu_seqlens=bounds)[0]) < 1e-12  # fmt: skip


@pytest.mark.parametrize("documents", [False, True])
def test_a_slice_maps_the_state_before_it_to_the_state_after_it(documents):
    inputs, before = kda_inputs(4, 50, 1, 2, 8, 12, dtype=torch.float64), torch.randn(4, 2, 8, 12).double()
    positions = random_positions(4, 50, seed=3) if documents else None
    _, after = kda_rule_recurrent(*inputs, initial_state=before, output_final_state=True, positions_bs=positions)
    end, transition = final_state_and_transition(*inputs[1:], positions_bs=positions).split([12, 8], -1)
    assert relative_error(transition @ before + end, after) < 1e-12


def test_agrees_with_transformers():
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    inputs = kda_inputs(2, 100, 3, 3, 16, 24)
    ours = kda_rule(*inputs, output_final_state=True)
    for theirs in (kimi.chunk_kimi_delta_attention, kimi.recurrent_kimi_delta_attention):
        q, k, v, g, beta = inputs
        expected = theirs(q, k, v, g=g, beta=beta, initial_state=None, output_final_state=True)
        assert_near(ours, expected, 1e-5)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_the_gate(lower_bound):
    """Against the formula of fla's reference, which uses torch's softplus."""
    raw, A_log, dt_bias = torch.randn(2, 7, 3, 4), torch.randn(3), torch.randn(12)
    x = raw + dt_bias.view(3, 4)
    if lower_bound is None:
        expected = -A_log.exp()[:, None] * torch.nn.functional.softplus(x)
    else:
        expected = lower_bound * torch.sigmoid(A_log.exp()[:, None] * x)
    assert relative_error(log_decay(raw, A_log, dt_bias, lower_bound), expected) < 1e-6
    q, k, v, _, beta = kda_inputs(2, 7, 3, 3, 4, 8)
    gate = dict(A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound)
    assert relative_error(kda_rule(q, k, v, raw, beta, **gate)[0], kda_rule(q, k, v, expected, beta)[0]) < 1e-5


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_gradcheck(lower_bound):
    inputs = [x.requires_grad_() for x in kda_inputs(1, 5, 1, 2, 3, 2, dtype=torch.float64)]
    more = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2,), (6,), (1, 2, 3, 2))]

    def rule(*x):
        gate = dict(A_log=x[5], dt_bias=x[6], lower_bound=lower_bound)
        return kda_rule(*x[:5], **gate, initial_state=x[7], output_final_state=True)

    assert torch.autograd.gradcheck(rule, (*inputs, *more))


def test_bitwise_the_same_twice():
    inputs = kda_inputs(1, 100, 1, 2, 24, 48, dtype=torch.bfloat16)
    for first, second in zip(gradients(kda_rule_torch, inputs), gradients(kda_rule_torch, inputs)):
        assert torch.equal(first, second)


def test_dispatch_explains_and_refuses():
    q, k, v, g, beta = inputs = kda_inputs(1, 4, 1, 1, 4, 4)
    choice = explain(k, v)
    assert choice.backend == "torch" and "not on a CUDA device" in choice.rejected["fla"]
    assert "cu_seqlens" in explain(k, v, documents=True).rejected["fla"]
    assert "state per document" in explain(k, v, documents=True, bounds=True, states=True).rejected["fla"]
    with pytest.raises(ValueError, match="not on a CUDA device"):
        kda_rule(*inputs, backend="fla")
    with pytest.raises(ValueError, match="does not exist"):
        kda_rule(*inputs, backend="triton")
    for message, arguments, options in (
        ("g: expected", (q, k, v, g[..., 0], beta), {}),
        ("beta: expected", (q, k, v, g, beta[..., :0]), {}),
        ("q, k", (q, k[:, :2], v, g, beta), {}),
        ("cu_seqlens", [x.expand(2, *x.shape[1:]) for x in inputs], dict(cu_seqlens=torch.tensor([0, 4]))),
        ("positions_bs: expected int32", inputs, dict(positions_bs=torch.zeros(1, 3, dtype=torch.int32))),
        ("initial_state", inputs, dict(initial_state=torch.zeros(1))),
        ("dt_bias: give both", inputs, dict(A_log=torch.zeros(1))),
        ("A_log: expected", inputs, dict(A_log=torch.zeros(2), dt_bias=torch.zeros(4))),
        (r"lower_bound: expected a number in \[-5, 0\)", inputs, dict(lower_bound=-1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            kda_rule(*arguments, **options)


@pytest.fixture
def stand_in(monkeypatch):
    """A stand-in for fla's kernel: the signature of chunk_kda in fla 0.6.0, as far as it is used, and plain torch."""

    def chunk_kda(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_gate_in_kernel=False, safe_gate=False,
        lower_bound=None, cu_seqlens=None, *, A_log=None, dt_bias=None,
    ):  # fmt: skip
        assert use_gate_in_kernel == (A_log is not None) and safe_gate == (lower_bound is not None)
        gate = dict(A_log=A_log, dt_bias=dt_bias, lower_bound=lower_bound)
        options = dict(scale=scale, initial_state=initial_state, output_final_state=output_final_state)
        return kda_rule_recurrent(q, k, v, g, beta, cu_seqlens=cu_seqlens, **gate, **options)

    kernels = ModuleType("fla.ops.kda")
    kernels.chunk_kda = chunk_kda
    for name, module in (("fla", ModuleType("fla")), ("fla.ops", ModuleType("fla.ops")), ("fla.ops.kda", kernels)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
def test_the_call_of_fla(lower_bound, stand_in):
    """With its gate and states, without the gate, and with documents of two rows, which fla takes in one."""
    q, k, v, _, beta = kda_inputs(2, 20, 1, 2, 4, 8, dtype=torch.float64)
    raw, initial = torch.randn(2, 20, 2, 4).double(), torch.randn(2, 2, 4, 8).double()
    gate = dict(A_log=torch.randn(2).double(), dt_bias=torch.randn(8).double(), lower_bound=lower_bound)
    states = dict(initial_state=initial, output_final_state=True, scale=0.3)
    plain = dict(A_log=None, dt_bias=None, lower_bound=None)
    for options in (gate, plain):
        g = raw if options is gate else -raw.abs()
        expected = kda_rule(q, k, v, g, beta, **options, **states)
        assert_near(fla.kda_rule_fla(q, k, v, g, beta, cu_seqlens=None, **options, **states), expected, 1e-12)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([3, 17], [20])]).int()
    without = dict(initial_state=None, output_final_state=False, scale=None)
    o, state = fla.kda_rule_fla(
        q, k, v, raw, beta, cu_seqlens=torch.tensor([0, 3, 20, 40, 40]), **gate, **without
    )  # fmt: skip
    assert state is None
    assert relative_error(o, kda_rule(q, k, v, raw, beta, positions_bs=positions, **gate)[0]) < 1e-12


@pytest.mark.parametrize(
    ("version", "reason"),
    [("0.6.0", None), ("0.6.1.dev0", None), ("0.5.9", "fla 0.5.9 is not 0.6.0 or later"), (None, "unknown release")],
)
def test_old_releases_of_fla_are_refused(version, reason, monkeypatch):
    def version_of(package):
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(fla.metadata, "version", version_of)
    monkeypatch.setattr(fla, "has_module", lambda name: True)
    v = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    found = fla.unsupported_reason(v, 128, None)
    assert found is None if reason is None else reason in found
    assert "above 256" in fla.unsupported_reason(v, 257, None)
    assert "bf16 or fp16" in fla.unsupported_reason(SimpleNamespace(is_cuda=True, dtype=torch.float32), 128, None)


def test_sequences_that_do_not_cover_the_row_are_refused():
    q, k, v, g = (torch.zeros(1, 4, 1, 8) for _ in range(4))
    beta = torch.zeros(1, 4, 1)
    for bounds in ([0, 3], [1, 4]):
        with pytest.raises(RuntimeError, match="cu_seqlens: the sequences do not cover the row of 4 tokens"):
            kda_rule(q, k, v, g, beta, cu_seqlens=torch.tensor(bounds))
