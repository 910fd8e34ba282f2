"""head_norm_rope and sigmoid_gate in plain torch against transformers' Qwen3.5 attention, gradcheck, and wrong shapes."""

import pytest
import torch

from hybrid_kernels.head_norm_rope import head_norm_rope
from hybrid_kernels.sigmoid_gate import sigmoid_gate


def head_inputs(length, batch, heads, groups, dim, turned, gated, dtype=torch.float32):
    """Draw packed_sbw, q_weight, k_weight and angles of `turned` channels; 0: None."""
    drawn = dict(generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    packed = 3 * torch.randn(length, batch, (heads * (1 + gated) + 2 * groups) * dim, **drawn)
    weights = [(1 + 0.2 * torch.randn(dim, **drawn)).to(dtype) for _ in "qk"]
    angles = None
    if turned:
        angles = torch.outer(torch.arange(length).float(), 1e4 ** (-torch.arange(turned // 2) / (turned // 2)))
        angles = torch.cat((angles, angles), -1)[:, None, None]
    return [packed.to(dtype), *weights, angles]


@pytest.mark.parametrize("turned", [4, 16, 0])
def test_agrees_with_transformers(turned):
    qwen = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    packed, q_weight, k_weight, angles = head_inputs(5, 2, 6, 2, 16, turned, True, torch.float64)
    q, k, v, gate = packed.split([96, 32, 32, 96], dim=-1)
    expected = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        norm = qwen.Qwen3_5RMSNorm(16, eps=1e-6)
        norm.weight.data = weight - 1
        expected.append(norm(x.unflatten(-1, (-1, 16))).double().permute(1, 2, 0, 3))  # [b, heads, s, d]
    if turned:
        position = angles.view(1, 5, turned).double()
        expected = qwen.apply_rotary_pos_emb(*expected, position.cos(), position.sin())
    options = dict(num_heads=6, num_groups=2, eps=1e-6, gated=True)
    results = head_norm_rope(packed, q_weight, k_weight, angles, **options)
    theirs = (*(x.permute(2, 0, 1, 3) for x in expected), v.unflatten(-1, (2, 16)), gate)
    for mine, their in zip(results, theirs, strict=True):
        torch.testing.assert_close(mine, their, rtol=1e-6, atol=1e-6)  # theirs normalises in fp32
    torch.testing.assert_close(sigmoid_gate(q, results[3]), q * torch.sigmoid(gate))


@pytest.mark.parametrize("turned", [2, 0])
def test_gradcheck(turned):
    *leaves, angles = head_inputs(3, 1, 2, 1, 4, turned, True, torch.float64)
    leaves = [x.requires_grad_() for x in leaves]
    options = dict(num_heads=2, num_groups=1, eps=1e-6, gated=True)
    assert torch.autograd.gradcheck(lambda *x: head_norm_rope(*x, angles, **options), leaves)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: [x[0][..., :-1], *x[1:]], "packed_sbw: expected"),
        (lambda x: [x[0], x[1][:-2], *x[2:]], "k_weight: expected"),
        (lambda x: [*x[:3], x[3][:-1]], "angles_sb1r: expected"),
        (lambda x: [*x[:3], x[3].repeat(1, 1, 1, 9)], "angles_sb1r: expected"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        head_norm_rope(*change(head_inputs(5, 2, 6, 2, 16, 4, False)), num_heads=6, num_groups=2, eps=1e-6)
    with pytest.raises(ValueError, match="gate_sbw: expected"):
        sigmoid_gate(torch.ones(2, 2, 4), torch.ones(2, 2, 5))
