"""The oracle of `conv_gates` in plain torch: any device, fp32 inside (fp64 for fp64 inputs), autograd.

Source: transformers `olmo_hybrid` (OlmoHybridGatedDeltaNet.forward), whose conv, L2 norm and gates this restates
for megatron's [sequence, batch, width] layout.
"""

import torch
import torch.nn.functional as F

from ..slices import FromPrevious

L2_EPS = 1e-6  # inside the square root, as in fla and transformers


def widths(num_key_heads: int, num_value_heads: int, key_head_dim: int, value_head_dim: int) -> list[int]:
    """Widths of [q | k | v | gate | b | a] on the last dimension of the packed projection."""
    key, value = num_key_heads * key_head_dim, num_value_heads * value_head_dim
    return [key, key, value, value, num_value_heads, num_value_heads]


def position_in_document(length: int, cu_seqlens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[length] position of each token in its document; cu_seqlens [n + 1] may contain empty documents."""
    token = torch.arange(length, device=device)
    document = torch.searchsorted(cu_seqlens.to(device=device, dtype=torch.long), token, right=True) - 1
    return token - cu_seqlens.to(device=device, dtype=torch.long)[document]


def causal_conv_silu(x_sbc: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Depthwise causal convolution and SiLU. x_sbc [s, b, C]; weight [C, taps], the last tap meets the token itself."""
    length, taps = x_sbc.shape[0], weight.shape[1]
    position = None if cu_seqlens is None else position_in_document(length, cu_seqlens, x_sbc.device)
    out = x_sbc * weight[:, -1]
    for back in range(1, min(taps, length)):
        shifted = F.pad(x_sbc[:-back], (0, 0, 0, 0, back, 0))
        if position is not None:
            shifted = shifted * (position >= back).to(shifted.dtype)[:, None, None]
        out = out + shifted * weight[:, taps - 1 - back]
    return F.silu(out)


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS)


def conv_gates_torch(
    packed_sbh, conv_weight, A_log, dt_bias, *, num_key_heads, num_value_heads, key_head_dim, value_head_dim,
    allow_negative_eigenvalues=True, cu_seqlens=None, group=None,
):  # fmt: skip
    """See `hybrid_kernels.conv_gates.conv_gates`, whose arguments and results these are."""
    back = conv_weight.shape[1] - 1 if group is not None else 0
    if back:
        packed_sbh = torch.cat((FromPrevious.apply(packed_sbh[-back:], group), packed_sbh))
    key, _, value, _, heads, _ = sizes = widths(num_key_heads, num_value_heads, key_head_dim, value_head_dim)
    length, batch = packed_sbh.shape[:2]
    compute = torch.float64 if packed_sbh.dtype == torch.float64 else torch.float32
    gates_at = sum(sizes[:4])

    mixed = causal_conv_silu(packed_sbh[..., : 2 * key + value].to(compute), conv_weight.to(compute), cu_seqlens)
    q, k, v = mixed.transpose(0, 1).split([key, key, value], dim=-1)
    q = l2_normalise(q.reshape(batch, length, num_key_heads, key_head_dim))
    k = l2_normalise(k.reshape(batch, length, num_key_heads, key_head_dim))
    v = v.reshape(batch, length, num_value_heads, value_head_dim)

    b, a = packed_sbh[..., gates_at : gates_at + 2 * heads].to(compute).transpose(0, 1).split(heads, dim=-1)
    beta = torch.sigmoid(b) * (2.0 if allow_negative_eigenvalues else 1.0)
    # softplus with an infinite threshold: torch's switch to the identity at 20 is not a derivative gradcheck likes
    x = a + dt_bias.to(compute)
    softplus = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
    g = -torch.exp(A_log.to(compute)) * softplus
    dtype = packed_sbh.dtype
    results = tuple(t.to(dtype) for t in (q, k, v)) + (g, beta)
    return tuple(t[:, back:].contiguous() for t in results)
