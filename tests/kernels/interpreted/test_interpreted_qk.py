"""qk_norm_rope's Triton kernels under the interpreter, alone and with the heads shared by two ranks."""

import pytest
import torch
import torch.distributed as dist

from hybrid_kernels.qk_norm_rope import explain, qk_norm_rope
from hybrid_kernels.testing import angles_of_sequences, qkv_inputs, random_positions, relative_error


def gradients(inputs, *, layout=None, **options):
    """Return results and gradients. `layout`: memory order of the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
    results = qk_norm_rope(*leaves, inputs[3], eps=1e-6, **options)
    given = [x.detach().double().cos().to(x.dtype) for x in results]  # the same on every rank's heads
    if layout is not None:
        given = [g.permute(layout).contiguous().permute(torch.tensor(layout).argsort().tolist()) for g in given]
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, given))]


def agree(ours, oracle, tolerance):
    for mine, theirs in zip(ours, oracle, strict=True):
        assert torch.isfinite(mine).all()
        assert relative_error(mine, theirs) < tolerance


def exact(inputs, **options):
    return gradients([x.double() for x in inputs[:3]] + [inputs[3]], backend="torch", **options)


@pytest.mark.parametrize(
    "heads, groups, head_dim, layout",
    [(3, 3, 16, None), (3, 3, 16, (2, 1, 3, 0)), (5, 2, 12, None), (5, 2, 12, (1, 2, 0, 3)), (1, 1, 32, (2, 1, 3, 0))],
)
def test_against_fp64(heads, groups, head_dim, layout):
    inputs = qkv_inputs(7, 2, heads, groups, head_dim)
    options = dict(head_dim=head_dim, true_widths=(heads * head_dim, groups * head_dim))
    agree(gradients(inputs, layout=layout, backend="triton", **options), exact(inputs, **options), 1e-5)


def test_angles_of_each_sequence():
    inputs = list(qkv_inputs(9, 3, 3, 3, 16))
    options = dict(head_dim=16, true_widths=(48, 48))
    shared = gradients(inputs, backend="triton", **options)
    inputs[3] = inputs[3].expand(-1, 3, -1, -1)
    assert all(torch.equal(x, y) for x, y in zip(shared, gradients(inputs, backend="triton", **options)))
    inputs[3] = angles_of_sequences(inputs[3][:, :1], random_positions(3, 9, seed=0).clamp(max=8))
    agree(gradients(inputs, backend="triton", **options), exact(inputs, **options), 1e-5)


def test_without_rotary_and_with_several_tokens_a_program(monkeypatch):
    from hybrid_kernels.qk_norm_rope.backends.triton import op

    monkeypatch.setattr(op, "BACKWARD_PROGRAMS", 3)
    inputs = (*qkv_inputs(7, 2, 3, 3, 16)[:3], None)
    options = dict(head_dim=16, true_widths=(40, 40))  # fewer than there are: dummy heads
    agree(gradients(inputs, backend="triton", **options), exact(inputs, **options), 1e-5)


def test_in_bf16_twice():
    inputs = qkv_inputs(9, 1, 3, 3, 16, dtype=torch.bfloat16)
    options = dict(head_dim=16, true_widths=(48, 48))
    assert explain(*inputs).backend == "triton"
    ours, again = gradients(inputs, **options), gradients(inputs, **options)
    assert all(torch.equal(x, y) and x.dtype == torch.bfloat16 for x, y in zip(ours, again))
    agree(ours[:3], exact(inputs, **options)[:3], 5e-3)  # the interpreter cuts off where the GPU rounds


def shared(inputs, heads, groups, head_dim):
    """Run one of two ranks, with half of the heads of q and of k."""
    qkv, q_weight, k_weight, angles = inputs
    rank, ranks = dist.get_rank(), dist.get_world_size()
    q_width, k_width = heads * head_dim, groups * head_dim
    q, k, v = qkv.split([q_width, k_width, k_width], dim=-1)
    mine = [x.chunk(ranks, dim=-1)[rank] for x in (q, k, v, q_weight, k_weight)]
    packed = torch.cat(mine[:3], dim=-1)
    options = dict(head_dim=head_dim, true_widths=(q_width, k_width), all_reduce=dist.all_reduce, backend="triton")
    return gradients((packed, *mine[3:], angles), **options)


@pytest.mark.parametrize("heads, groups, head_dim", [(4, 4, 16), (6, 2, 12)])
def test_two_ranks_share_the_heads(heads, groups, head_dim, ranks):
    inputs, widths = qkv_inputs(5, 2, heads, groups, head_dim), (heads * head_dim, groups * head_dim)
    q, k, v, dqkv, dq_weight, dk_weight = exact(inputs, head_dim=head_dim, true_widths=widths)
    both = ranks.run(shared, 2, inputs=inputs, heads=heads, groups=groups, head_dim=head_dim)
    for rank, results in enumerate(both):
        expected = [x.chunk(2, dim=2)[rank] for x in (q, k, v)]
        parts = dqkv.split([widths[0], widths[1], widths[1]], dim=-1)
        expected.append(torch.cat([x.chunk(2, dim=-1)[rank] for x in parts], dim=-1))
        expected += [x.chunk(2)[rank] for x in (dq_weight, dk_weight)]
        agree(results, expected, 1e-5)
