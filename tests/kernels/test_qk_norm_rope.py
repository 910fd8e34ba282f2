"""qk_norm_rope in plain torch against transformers' norm and megatron-core's rotation, gradcheck, and two ranks' heads."""

import pytest
import torch
import torch.distributed as dist

from hybrid_kernels.documents import positions_from_cu_seqlens
from hybrid_kernels.qk_norm_rope import explain, qk_norm_rope
from hybrid_kernels.testing import angles_of_sequences, qkv_inputs

OPTIONS = dict(head_dim=6, eps=1e-6)


@pytest.mark.parametrize("rotary", [True, False])
def test_agrees_with_transformers(rotary):
    olmo = pytest.importorskip("transformers.models.olmo3.modeling_olmo3")
    qkv, q_weight, k_weight, angles = qkv_inputs(5, 2, 4, 2, 6, dtype=torch.float64)
    q, k, v = qkv.split([24, 12, 12], dim=-1)
    expected = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        norm = olmo.Olmo3RMSNorm(x.shape[-1], eps=1e-6)
        norm.weight.data = weight
        expected.append(norm(x).double().unflatten(-1, (-1, 6)).permute(1, 2, 0, 3))  # [b, heads, s, d]
    if rotary:
        position = angles.view(1, 5, 6).double()
        expected = olmo.apply_rotary_pos_emb(*expected, position.cos(), position.sin())
    results = qk_norm_rope(qkv, q_weight, k_weight, angles if rotary else None, true_widths=(24, 12), **OPTIONS)
    for mine, theirs in zip(results, (*(x.permute(2, 0, 1, 3) for x in expected), v.unflatten(-1, (2, 6)))):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # theirs normalises in fp32


@pytest.mark.parametrize("rotary", [True, False])
def test_gradcheck(rotary):
    qkv, q_weight, k_weight, angles = qkv_inputs(3, 1, 2, 1, 4, dtype=torch.float64)
    options = dict(head_dim=4, true_widths=(8, 4), eps=1e-6)
    leaves = [x.requires_grad_() for x in (qkv, q_weight, k_weight)]
    assert torch.autograd.gradcheck(lambda *x: qk_norm_rope(*x, angles if rotary else None, **options), leaves)


def gradients(inputs, **options):
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    results = qk_norm_rope(*leaves, inputs[3], **OPTIONS, **options)
    given = [x.detach().cos() for x in results]  # the same on every rank's heads
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, given))]


def shared(inputs):
    """Run one of two ranks, with half of the heads of q and of k."""
    qkv, q_weight, k_weight, angles = inputs
    rank, ranks = dist.get_rank(), dist.get_world_size()
    q, k, v = qkv.split([24, 12, 12], dim=-1)
    mine = [x.chunk(ranks, dim=-1)[rank] for x in (q, k, v, q_weight, k_weight)]
    packed = torch.cat(mine[:3], dim=-1)
    return gradients((packed, *mine[3:], angles), true_widths=(24, 12), all_reduce=dist.all_reduce)


def test_two_ranks_share_the_heads(ranks):
    inputs = qkv_inputs(5, 2, 4, 2, 6, dtype=torch.float64)
    q, k, v, dqkv, dq_weight, dk_weight = gradients(inputs, true_widths=(24, 12))
    for rank, results in enumerate(ranks.run(shared, 2, inputs=inputs)):
        expected = [x.chunk(2, dim=2)[rank] for x in (q, k, v)]
        expected.append(torch.cat([x.chunk(2, dim=-1)[rank] for x in dqkv.split([24, 12, 12], dim=-1)], dim=-1))
        expected += [x.chunk(2)[rank] for x in (dq_weight, dk_weight)]
        for mine, theirs in zip(results, expected):
            torch.testing.assert_close(mine, theirs)


def test_dummy_heads_take_no_part():
    qkv, q_weight, k_weight, angles = qkv_inputs(5, 2, 4, 2, 6, dtype=torch.float64)
    padded = torch.cat([torch.cat((x, x.new_zeros(5, 2, 6)), -1) for x in qkv.split([24, 12, 12], dim=-1)], -1)
    weights = [torch.cat((w, w.new_ones(6))) for w in (q_weight, k_weight)]
    plain = qk_norm_rope(qkv, q_weight, k_weight, angles, true_widths=(24, 12), **OPTIONS)
    wide = qk_norm_rope(padded, *weights, angles, true_widths=(24, 12), **OPTIONS)
    for x, y in zip(plain, wide):
        torch.testing.assert_close(x, y[:, :, :-1])
        assert not y[:, :, -1].any()


def test_documents_are_separate_sequences():
    qkv, q_weight, k_weight, angles = qkv_inputs(9, 2, 4, 2, 6, dtype=torch.float64)
    bounds = [[0, 2, 3, 9], [0, 9]]
    positions = torch.cat([positions_from_cu_seqlens(torch.tensor(row), 9) for row in bounds])
    options = dict(true_widths=(24, 12), **OPTIONS)
    packed = qk_norm_rope(qkv, q_weight, k_weight, angles_of_sequences(angles, positions), **options)
    for row, of_row in enumerate(bounds):
        for start, end in zip(of_row[:-1], of_row[1:]):
            own = qk_norm_rope(qkv[start:end, row : row + 1], q_weight, k_weight, angles[: end - start], **options)
            for x, y in zip(packed, own):
                torch.testing.assert_close(x[start:end, row], y[:, 0], rtol=1e-12, atol=1e-12)


def test_says_what_it_chose_and_refuses_what_does_not_fit():
    qkv, q_weight, k_weight, angles = qkv_inputs(5, 2, 4, 2, 6)
    options = dict(true_widths=(24, 12), **OPTIONS)
    assert explain(qkv, q_weight, k_weight, angles).backend == "torch"
    with pytest.raises(ValueError, match="qkv_sbw"):
        qk_norm_rope(qkv[..., :-1], q_weight, k_weight, angles, **options)
    with pytest.raises(ValueError, match="q_weight"):
        qk_norm_rope(qkv, q_weight, k_weight, angles, head_dim=5, true_widths=(24, 12), eps=1e-6)
    with pytest.raises(ValueError, match="angles_sb1d"):
        qk_norm_rope(qkv, q_weight, k_weight, angles[:4], **options)
    with pytest.raises(ValueError, match="not on a CUDA device"):
        qk_norm_rope(qkv, q_weight, k_weight, angles, backend="triton", **options)


def test_compiles_in_one_graph():
    inputs = qkv_inputs(5, 2, 4, 2, 6)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="eager")
    options = dict(true_widths=(24, 12), **OPTIONS)
    for mine, theirs in zip(compiled(*inputs, **options), qk_norm_rope(*inputs, **options)):
        torch.testing.assert_close(mine, theirs)
