"""linear_cross_entropy and qk_norm_rope on the GPU against fp64: twice the same, no host sync, CUDA graphs, torch.compile.

A mirror that holds what this rank holds stands for a second rank; tests/kernels/interpreted has real ranks.
"""

from contextlib import contextmanager

import pytest
import torch

from hybrid_kernels.linear_cross_entropy import linear_cross_entropy
from hybrid_kernels.qk_norm_rope import qk_norm_rope
from hybrid_kernels.testing import (
    angles_of_sequences,
    loss_inputs,
    mirror_all_reduce,
    mirror_vocab_parallel,
    qkv_inputs,
    random_positions,
    relative_error,
)

BF16 = dict(dtype=torch.bfloat16, device="cuda")
QK = dict(head_dim=128, eps=1e-6)


@contextmanager
def no_host_sync():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def doubles(inputs):
    return [x.double() if x is not None and x.dtype == torch.bfloat16 else x for x in inputs]


def loss_gradients(inputs, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    loss, cross_entropy, z = linear_cross_entropy(*leaves, *inputs[2:], z_loss_weight=0.01, **options)
    return [x.detach() for x in (loss, cross_entropy, z, *torch.autograd.grad(loss / 3, leaves))]


def agree(ours, oracle, tolerances):
    for mine, theirs, tolerance in zip(ours, oracle, tolerances, strict=True):
        assert torch.isfinite(mine).all()
        assert relative_error(mine, theirs) < tolerance


@pytest.mark.parametrize("fp32_logits, tolerance", [(True, 5e-3), (False, 1e-2)])
@pytest.mark.parametrize("rows, vocab_size, chunk_tokens", [(20_000, 19_990, None), (4096, 4096, 100), (336, 257, 999)])
def test_loss(rows, vocab_size, chunk_tokens, fp32_logits, tolerance):
    inputs = loss_inputs((300, 2), 256, rows, vocab_size, **BF16)
    options = dict(true_vocab_size=vocab_size)
    ours, again = (
        loss_gradients(inputs, backend="triton", chunk_tokens=chunk_tokens, fp32_logits=fp32_logits, **options)
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(ours, again))
    exact = loss_gradients(doubles(inputs), backend="torch", **options)
    agree(ours, exact, [tolerance / 100] * 3 + [tolerance] * 2)
    assert not ours[4][vocab_size:].any()


def test_loss_in_fp32():
    inputs = loss_inputs((500,), 256, 3000, 2990, device="cuda")
    exact = loss_gradients([x.double() if x.is_floating_point() else x for x in inputs], true_vocab_size=2990)
    agree(loss_gradients(inputs, true_vocab_size=2990, chunk_tokens=128), exact, [1e-5] * 5)


def test_loss_of_a_mirrored_rank():
    hidden, weight, labels, mask = loss_inputs((600,), 256, 4096, 4096, **BF16)
    ours = loss_gradients((hidden, weight, labels, mask), true_vocab_size=8192, vocab_parallel=mirror_vocab_parallel())
    whole = doubles((hidden, torch.cat((weight, weight)), labels, mask))
    *scalars, _, dweight = loss_gradients(whole, backend="torch", true_vocab_size=8192)
    agree([*ours[:3], ours[4]], [*scalars, dweight[:4096]], [5e-5] * 3 + [5e-3])


def test_loss_without_host_sync_and_into_a_buffer():
    hidden, weight, labels, mask = loss_inputs((600,), 256, 4096, 4000, **BF16)
    expected = loss_gradients((hidden, weight, labels, mask), true_vocab_size=4000)
    buffer = torch.zeros(4096, 256, device="cuda")
    weight.requires_grad_(), hidden.requires_grad_()
    options = dict(true_vocab_size=4000, z_loss_weight=0.01, grad_weight_buffer=buffer, chunk_tokens=200)
    with no_host_sync():
        loss, *_ = linear_cross_entropy(hidden, weight, labels, mask, **options)
        (loss / 3).backward()
    assert weight.grad is None and relative_error(buffer, expected[4]) < 3e-3


def _given(x):
    """Return a gradient of x [s, b, heads, d] in the memory order of flash attention's backward pass, [b, s, heads, d]."""
    return torch.cos(3 * x.detach().float()).to(torch.bfloat16).transpose(0, 1).contiguous().transpose(0, 1)


def qk_gradients(inputs, options, op=qk_norm_rope):
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    results = op(*leaves, inputs[3], **QK, **options)
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, [_given(x) for x in results]))]


def check_qk(inputs, options):
    ours, again = (qk_gradients(inputs, dict(options, backend="triton")) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(ours, again))
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    exact = qk_norm_rope(*leaves, inputs[3], **QK, **dict(options, backend="torch"))
    given = [_given(x).double() for x in ours[:3]]
    agree(ours, [*exact, *torch.autograd.grad(exact, leaves, given)], [4e-3] * 6)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("length, batch, heads, groups", [(300, 2, 30, 30), (1, 1, 8, 2), (1000, 1, 32, 8)])
def test_qk(length, batch, heads, groups, rotary):
    inputs = list(qkv_inputs(length, batch, heads, groups, 128, **BF16))
    inputs[3] = inputs[3] if rotary else None
    check_qk(inputs, dict(true_widths=(heads * 128, groups * 128)))


def test_qk_of_documents():
    inputs = list(qkv_inputs(300, 3, 4, 2, 128, **BF16))
    inputs[3] = angles_of_sequences(inputs[3], random_positions(3, 300, seed=0, device="cuda").clamp(max=299))
    check_qk(inputs, dict(true_widths=(512, 256)))


def test_qk_far_into_a_sequence():
    inputs = list(qkv_inputs(64, 1, 4, 4, 128, **BF16))
    inputs[3] = inputs[3] + 65_536.0  # radians
    check_qk(inputs, dict(true_widths=(512, 512)))


def test_qk_of_a_mirrored_rank():
    inputs = qkv_inputs(300, 1, 15, 15, 128, **BF16)
    ours = qk_gradients(inputs, dict(true_widths=(3840, 3840), all_reduce=mirror_all_reduce))
    alone = qk_gradients(inputs, dict(true_widths=(1920, 1920)))  # the same mean squares, the same part along
    agree(ours, alone, [1e-3] * 6)


def test_qk_without_host_sync_and_compiled():
    inputs, options = qkv_inputs(300, 1, 4, 2, 128, **BF16), dict(true_widths=(512, 256))
    expected = qk_gradients(inputs, options)
    compiled = qk_gradients(inputs, options, torch.compile(qk_norm_rope, fullgraph=True))
    assert all(torch.equal(x, y) for x, y in zip(compiled, expected))
    leaves = [x.requires_grad_() for x in inputs[:3]]
    with no_host_sync():
        results = qk_norm_rope(*leaves, inputs[3], **QK, **options)
        torch.autograd.grad(results, leaves, results)


def test_in_a_cuda_graph_and_under_a_compiler():
    hidden, weight, labels, mask = loss_inputs((600,), 256, 4096, 4000, **BF16)
    hidden.requires_grad_(), weight.requires_grad_()

    def step(hidden, weight):
        x = qk_norm_rope(hidden[:, None, :], *norms, angles, head_dim=32, true_widths=(128, 64), eps=1e-6)[0]
        joined = torch.cat((x.flatten(1), hidden[:, 128:]), -1)
        options = dict(true_vocab_size=4000, z_loss_weight=0.01, chunk_tokens=200)
        return linear_cross_entropy(joined, weight, labels, mask, **options)[0]

    norms = torch.ones(128, **BF16), torch.ones(64, **BF16)
    angles = qkv_inputs(600, 1, 1, 1, 32, **BF16)[3]
    eager = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    compiled = torch.autograd.grad(torch.compile(step)(hidden, weight), (hidden, weight))
    assert all(relative_error(x, y) < 1e-2 for x, y in zip(compiled, eager))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(step(hidden, weight), (hidden, weight))
    for x in captured:
        x.zero_()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, eager))
