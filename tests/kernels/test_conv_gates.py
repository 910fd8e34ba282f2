"""conv_gates in plain torch against transformers' pieces, separate documents, and gradcheck."""

import pytest
import torch

from hybrid_kernels.conv_gates import conv_gates, widths
from hybrid_kernels.documents import positions_from_cu_seqlens
from hybrid_kernels.testing import packed_inputs, relative_error

DIMS = dict(num_key_heads=2, num_value_heads=4, key_head_dim=6, value_head_dim=8)
SHAPE = (2, 4, 6, 8)


def test_agrees_with_transformers():
    olmo = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    packed, weight, A_log, dt_bias = packed_inputs(21, 2, *SHAPE)
    sizes = widths(**DIMS)
    q, k, v, g, beta, gate = conv_gates(packed, weight, A_log, dt_bias, return_gate=True, **DIMS)
    mixed, gate_in, b, a, _ = packed.split([sum(sizes[:3]), sizes[3], sizes[4], sizes[5], 3], dim=-1)
    conv = olmo.causal_conv1d_fn(mixed.permute(1, 2, 0), weight, activation="silu").transpose(1, 2)
    theirs = conv.split(sizes[:3], dim=-1)
    assert relative_error(q, olmo.l2norm(theirs[0].unflatten(-1, (2, 6)))) < 1e-5
    assert relative_error(k, olmo.l2norm(theirs[1].unflatten(-1, (2, 6)))) < 1e-5
    assert relative_error(v, theirs[2].unflatten(-1, (4, 8))) < 1e-5
    assert relative_error(beta, 2 * b.sigmoid().transpose(0, 1)) < 1e-6
    assert relative_error(g, -A_log.exp() * torch.nn.functional.softplus(a + dt_bias).transpose(0, 1)) < 1e-5
    assert torch.equal(gate, gate_in)


def test_documents_are_separate_sequences():
    packed, weight, A_log, dt_bias = packed_inputs(20, 1, *SHAPE, dtype=torch.float64)
    bounds = [0, 3, 3, 4, 20]
    positions = positions_from_cu_seqlens(torch.tensor(bounds), 20)
    joined = conv_gates(packed, weight, A_log, dt_bias, positions_bs=positions, **DIMS)
    for start, end in zip(bounds[:-1], bounds[1:]):
        if start < end:
            for whole, alone in zip(joined, conv_gates(packed[start:end], weight, A_log, dt_bias, **DIMS)):
                torch.testing.assert_close(whole[:, start:end], alone)


@pytest.mark.parametrize("negative", [True, False])
def test_gradcheck(negative):
    inputs = [x.requires_grad_() for x in packed_inputs(5, 1, 1, 2, 3, 2, dtype=torch.float64)]
    dims = dict(num_key_heads=1, num_value_heads=2, key_head_dim=3, value_head_dim=2)
    positions = torch.tensor([[7, 0, 1, 2, 0]], dtype=torch.int32)
    options = dict(dims, allow_negative_eigenvalues=negative, return_gate=True, positions_bs=positions)
    halo = torch.randn(3, 1, inputs[0].shape[2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: conv_gates(*x[:4], halo_sbw=x[4], **options), (*inputs, halo))


def test_without_a_decay():
    """A gate of another width than v, and no a: the same q, k, v and beta, and the same gradients."""
    packed, weight, A_log, dt_bias = (x.requires_grad_() for x in packed_inputs(21, 2, *SHAPE, dtype=torch.float64))
    sizes, gate_width = widths(**DIMS), 5
    assert widths(**DIMS, gate_width=gate_width, with_decay=False) == [*sizes[:3], gate_width, 4, 0]
    gate, b = (packed[..., start : start + n] for start, n in ((sum(sizes[:3]), gate_width), (sum(sizes[:4]), 4)))
    narrow = torch.cat((packed[..., : sum(sizes[:3])], gate, b, packed[..., -3:]), -1)
    q, k, v, _, beta = conv_gates(packed, weight, A_log, dt_bias, **DIMS)
    expected = (q, k, v, beta, gate)
    found = conv_gates(narrow, weight, None, None, gate_width=gate_width, return_gate=True, **DIMS)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    given = [torch.randn_like(x) for x in expected]
    of_both = (torch.autograd.grad(results, (packed, weight), given) for results in (found, expected))
    assert all(relative_error(x, y) < 1e-12 for x, y in zip(*of_both, strict=True))
    with pytest.raises(ValueError, match="dt_bias: it is None"):
        conv_gates(packed, weight, A_log, None, **DIMS)


def test_refuses_what_does_not_fit():
    packed, weight, A_log, dt_bias = packed_inputs(4, 2, *SHAPE)
    with pytest.raises(ValueError, match="packed_sbw"):
        conv_gates(packed[..., :50], weight, A_log, dt_bias, **DIMS)
    with pytest.raises(ValueError, match="weight_ct"):
        conv_gates(packed, weight[:-1], A_log, dt_bias, **DIMS)
    for positions in (torch.zeros(1, 4, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="positions_bs: expected int32"):
            conv_gates(packed, weight, A_log, dt_bias, positions_bs=positions, **DIMS)
    with pytest.raises(ValueError, match="does not exist"):
        conv_gates(packed, weight, A_log, dt_bias, backend="cuda", **DIMS)
