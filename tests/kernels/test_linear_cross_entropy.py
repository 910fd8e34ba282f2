"""linear_cross_entropy in plain torch against torch's cross_entropy, gradcheck, and a vocabulary that two ranks share."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from hybrid_kernels.linear_cross_entropy import explain, linear_cross_entropy
from hybrid_kernels.testing import loss_inputs
from megatron_hybrid.distributed.collectives import vocab_parallel

OPTIONS = dict(true_vocab_size=45, z_loss_weight=0.1)


def by_torch(hidden, weight, labels, mask):
    """Return loss, cross-entropy and z-loss by torch, on the true rows of the vocabulary."""
    logits = hidden @ weight[:45].t()
    cross_entropy = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
    means = [(x * mask.flatten()).mean() for x in (cross_entropy, logits.logsumexp(-1).flatten().square())]
    return means[0] + 0.1 * means[1], *means


def gradients(fn, hidden, weight, *rest):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    loss, cross_entropy, z = fn(*leaves, *rest)
    return loss, cross_entropy, z, *torch.autograd.grad(3 * loss, leaves)


@pytest.mark.parametrize("shape", [(7,), (3, 2)])
def test_agrees_with_torch(shape):
    inputs = loss_inputs(shape, 8, 48, 45, dtype=torch.float64)
    ours = gradients(lambda *x: linear_cross_entropy(*x, **OPTIONS), *inputs)
    for mine, theirs in zip(ours, gradients(by_torch, *inputs)):
        torch.testing.assert_close(mine, theirs)
    assert not ours[4][45:].any(), "padding receives no gradient"


def test_gradcheck():
    hidden, weight, labels, mask = loss_inputs((4,), 3, 48, 45, dtype=torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, mask, **OPTIONS)[0], leaves)


def test_gradient_into_a_buffer():
    hidden, weight, labels, mask = loss_inputs((7,), 8, 48, 45)
    expected = gradients(lambda *x: linear_cross_entropy(*x, **OPTIONS), hidden, weight, labels, mask)
    buffer = torch.ones(48, 8)
    weight.requires_grad_()
    for _ in range(2):  # micro-batches
        loss, *_ = linear_cross_entropy(hidden, weight, labels, mask, grad_weight_buffer=buffer, **OPTIONS)
        (3 * loss).backward()
    assert weight.grad is None
    torch.testing.assert_close(buffer, 1 + 2 * expected[4])


def test_losses_of_tokens():
    hidden, weight, labels, mask = loss_inputs((3, 2), 8, 48, 45, dtype=torch.float64)
    found = torch.empty(3, 2)
    _, cross_entropy, _ = linear_cross_entropy(hidden, weight, labels, mask, token_losses=found, **OPTIONS)
    logits = (hidden @ weight[:45].t()).flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=-100) * mask.flatten()
    torch.testing.assert_close(found.flatten(), expected, check_dtype=False)
    torch.testing.assert_close(found.mean(), cross_entropy, check_dtype=False)


def test_detached_results_and_no_grad():
    hidden, weight, labels, mask = loss_inputs((7,), 8, 48, 45)
    loss, cross_entropy, z = linear_cross_entropy(hidden, weight.requires_grad_(), labels, mask, **OPTIONS)
    assert loss.requires_grad and not cross_entropy.requires_grad and not z.requires_grad
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels, mask, **OPTIONS)[0].requires_grad


def shared(inputs, vocab_size):
    """Return results and gradients of one of the ranks that share the vocabulary. Hidden's gradient is summed over them."""
    hidden, weight, labels, mask = inputs
    mine = weight.chunk(dist.get_world_size())[dist.get_rank()]
    options = dict(true_vocab_size=vocab_size, z_loss_weight=0.1, vocab_parallel=vocab_parallel(dist.group.WORLD))
    results = gradients(lambda *x: linear_cross_entropy(*x, **options), hidden, mine, labels, mask)
    dist.all_reduce(results[3])
    return [x.detach() for x in results]


@pytest.mark.parametrize("vocab_size", [45, 20])  # of 48 rows: with 20 the second rank holds padding alone
def test_two_ranks_share_the_vocabulary(vocab_size, ranks):
    inputs = loss_inputs((7,), 8, 48, vocab_size, dtype=torch.float64)
    options = dict(true_vocab_size=vocab_size, z_loss_weight=0.1)
    alone = gradients(lambda *x: linear_cross_entropy(*x, **options), *inputs)
    both = ranks.run(shared, 2, inputs=inputs, vocab_size=vocab_size)
    for results in both:
        for mine, theirs in zip(results[:4], alone[:4]):
            torch.testing.assert_close(mine, theirs.detach())
    torch.testing.assert_close(torch.cat([results[4] for results in both]), alone[4])


def test_says_what_it_chose_and_refuses_what_does_not_fit():
    hidden, weight, labels, mask = loss_inputs((7,), 8, 48, 45)
    assert explain(hidden, weight).backend == "torch"
    for field, change in (
        ("weight", dict(weight=weight[:, :4])),
        ("weight", dict(weight=weight.bfloat16())),
        ("hidden", dict(hidden=hidden.half(), weight=weight.half())),
        ("labels", dict(labels=labels[:3])),
        ("token_losses", dict(token_losses=torch.empty(3))),
        ("loss_mask", dict(loss_mask=mask[:3])),
        ("chunk_tokens", dict(chunk_tokens=0)),
        ("grad_weight_buffer", dict(grad_weight_buffer=torch.zeros(48, 8, dtype=torch.bfloat16))),
        ("backend", dict(backend="triton")),
    ):
        arguments = dict(hidden=hidden, weight=weight, labels=labels, loss_mask=mask, **OPTIONS) | change
        with pytest.raises(ValueError, match=field):
            linear_cross_entropy(**arguments)


def test_compiles_in_one_graph():
    inputs = loss_inputs((7,), 8, 48, 45)
    compiled = torch.compile(lambda *x: linear_cross_entropy(*x, **OPTIONS), fullgraph=True, backend="eager")
    torch.testing.assert_close(
        gradients(compiled, *inputs), gradients(lambda *x: linear_cross_entropy(*x, **OPTIONS), *inputs)
    )


@pytest.mark.parametrize("label", [-100, 44, 45, 47, 48])
def test_a_label_whose_mask_is_zero_may_have_any_value(label):
    hidden, weight, labels, mask = loss_inputs((7,), 8, 48, 45, dtype=torch.float64)
    labels[2], mask[2] = 0, 0.0
    expected = gradients(lambda *x: linear_cross_entropy(*x, **OPTIONS), hidden, weight, labels, mask)
    labels = labels.clone()
    labels[2] = label
    for mine, other in zip(
        gradients(lambda *x: linear_cross_entropy(*x, **OPTIONS), hidden, weight, labels, mask), expected
    ):
        assert torch.equal(mine, other)
