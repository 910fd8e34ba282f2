"""linear_cross_entropy's Triton kernels under the interpreter: chunks, blocks, padding, and a vocabulary of two ranks."""

import pytest
import torch
import torch.distributed as dist

from hybrid_kernels.linear_cross_entropy import explain, linear_cross_entropy
from hybrid_kernels.testing import loss_inputs, relative_error
from megatron_hybrid.distributed.collectives import vocab_parallel


def gradients(inputs, upstream=1.0, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    loss, cross_entropy, z = linear_cross_entropy(*leaves, *inputs[2:], z_loss_weight=0.05, **options)
    return [x.detach() for x in (loss, cross_entropy, z, *torch.autograd.grad(upstream * loss, leaves))]


def exact(inputs, **options):
    return gradients([x.double() if x.is_floating_point() else x for x in inputs], backend="torch", **options)


def agree(ours, oracle, tolerance):
    for mine, theirs in zip(ours, oracle, strict=True):
        assert torch.isfinite(mine).all()
        assert relative_error(mine, theirs) < tolerance


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    from hybrid_kernels.linear_cross_entropy.backends.triton import op

    monkeypatch.setattr(op, "BLOCK", 32)


@pytest.mark.parametrize("chunk_tokens", [None, 3, 1])
@pytest.mark.parametrize("rows, vocab_size", [(80, 70), (64, 64), (33, 20)])
def test_against_fp64(rows, vocab_size, chunk_tokens):
    inputs = loss_inputs((4, 2), 16, rows, vocab_size, spread=5.0)
    options = dict(true_vocab_size=vocab_size, upstream=1 / 3)
    ours = gradients(inputs, chunk_tokens=chunk_tokens, backend="triton", **options)
    agree(ours, exact(inputs, **options), 1e-5)
    assert not ours[4][vocab_size:].any(), "padding receives no gradient"


@pytest.mark.parametrize("fp32_logits, of_loss, of_gradients", [(True, 1e-5, 6e-3), (False, 2e-3, 1.5e-2)])
def test_in_bf16(fp32_logits, of_loss, of_gradients):
    inputs = loss_inputs((9,), 16, 80, 70, dtype=torch.bfloat16, spread=2.0)
    assert explain(*inputs[:2]).backend == "triton"
    options = dict(true_vocab_size=70, upstream=1 / 3)
    ours, again = (gradients(inputs, chunk_tokens=4, fp32_logits=fp32_logits, **options) for _ in range(2))
    oracle = exact(inputs, **options)
    agree(ours[:3], oracle[:3], of_loss)
    agree(ours[3:], oracle[3:], of_gradients)
    assert all(torch.equal(x, y) for x, y in zip(ours, again))
    assert ours[3].dtype == ours[4].dtype == torch.bfloat16


@pytest.mark.parametrize("chunk_tokens", [None, 3])
def test_losses_of_tokens(chunk_tokens):
    inputs, found, oracle = loss_inputs((4, 2), 16, 80, 70, spread=5.0), torch.empty(4, 2), torch.empty(4, 2)
    options = dict(true_vocab_size=70, z_loss_weight=0.05)
    linear_cross_entropy(*inputs, token_losses=found, chunk_tokens=chunk_tokens, backend="triton", **options)
    linear_cross_entropy(*inputs, token_losses=oracle, backend="torch", **options)
    assert relative_error(found, oracle) < 1e-5 and oracle.unique().numel() > 2


def test_gradient_into_a_buffer_once():
    hidden, weight, labels, mask = loss_inputs((9,), 16, 80, 70, dtype=torch.bfloat16)
    oracle = exact((hidden, weight, labels, mask), true_vocab_size=70)
    buffer = torch.ones(80, 16)
    hidden.requires_grad_(), weight.requires_grad_()
    options = dict(true_vocab_size=70, z_loss_weight=0.05, grad_weight_buffer=buffer, fp32_logits=True)
    loss, *_ = linear_cross_entropy(hidden, weight, labels, mask, **options)
    (2 * loss).backward(retain_graph=True)
    assert weight.grad is None
    assert relative_error(buffer - 1, 2 * oracle[4]) < 5e-3
    assert relative_error(hidden.grad, 2 * oracle[3]) < 5e-3
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_computes_only_the_gradients_that_are_wanted(monkeypatch):
    from hybrid_kernels.linear_cross_entropy.backends.triton import op

    products = []
    monkeypatch.setattr(op, "_gemm", lambda a, b, out, add=False: products.append(out.copy_(a @ b).shape))
    hidden, weight, labels, mask = loss_inputs((9,), 16, 80, 70)
    hidden.requires_grad_()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, labels, mask, true_vocab_size=70, z_loss_weight=0.05)
    assert products == [(9, 80)]
    loss, *_ = linear_cross_entropy(hidden, weight, labels, mask, true_vocab_size=70, z_loss_weight=0.05)
    assert products[1:] == [(9, 80), (9, 16)] and torch.autograd.grad(loss, hidden)[0].any()


def test_chunks_are_even_and_their_logits_within_a_gibibyte():
    from hybrid_kernels.linear_cross_entropy.backends.triton.op import chunk_size

    assert chunk_size(8192, 100352, 4) == 2048 and chunk_size(8192, 100352, 2) == 4096
    assert chunk_size(8192, 100352 // 2, 2) == 8192 and chunk_size(100, 256, 4) == 100
    for tokens in (1, 1000, 8191, 65536):
        size = chunk_size(tokens, 100352, 4)
        assert 0 < size <= tokens and (size - 128) * 100352 * 4 <= 2**30


def shared(inputs, vocab_size):
    hidden, weight, labels, mask = inputs
    mine = weight.chunk(dist.get_world_size())[dist.get_rank()]
    options = dict(
        true_vocab_size=vocab_size, vocab_parallel=vocab_parallel(dist.group.WORLD), backend="triton", chunk_tokens=4
    )
    results = gradients((hidden, mine, labels, mask), **options)
    dist.all_reduce(results[3])
    return results


@pytest.mark.parametrize("vocab_size", [75, 30])  # of 80 rows: with 30 the second rank holds padding alone
def test_two_ranks_share_the_vocabulary(vocab_size, ranks):
    inputs = loss_inputs((9,), 16, 80, vocab_size, spread=5.0)
    oracle = exact(inputs, true_vocab_size=vocab_size)
    both = ranks.run(shared, 2, inputs=inputs, vocab_size=vocab_size)
    for results in both:
        agree(results[:4], oracle[:4], 1e-5)
    agree([torch.cat([results[4] for results in both])], oracle[4:], 1e-5)


def test_under_a_compiler():
    inputs, options = loss_inputs((9,), 16, 80, 70), dict(true_vocab_size=70, z_loss_weight=0.05, backend="triton")

    def step(hidden, weight):  # a compiled caller breaks its graph around the op
        loss, cross_entropy, z = linear_cross_entropy(2 * hidden, weight, *inputs[2:], **options)
        return 3 * loss, cross_entropy + z

    for name, run in (("eager", step), ("compiled", torch.compile(step, backend="aot_eager"))):
        leaves = [x.clone().requires_grad_() for x in inputs[:2]]
        loss, others = run(*leaves)
        results = loss.detach(), others, *torch.autograd.grad(loss, leaves)
        if name == "eager":
            expected = results
    torch.testing.assert_close(results, expected)
