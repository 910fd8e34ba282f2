"""Oracle of `conv_gates` in plain torch: any device, autograd, computed in fp32 or, for fp64 inputs, in fp64.

Source: the convolution, L2 norm and gates of transformers `olmo_hybrid` (OlmoHybridGatedDeltaNet.forward), in megatron's
[sequence, batch, width] layout. Suffixes of tensor names: see the package's docstring.
"""

import torch
import torch.nn.functional as F

L2_EPS = 1e-6
"""Added inside the square root, as in fla and transformers."""


def widths(
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    gate_width: int | None = None,
    with_decay: int = True,
) -> list[int]:
    """Return the widths of [q | k | v | gate | b | a] in the last dimension of the packed projection.

    Args:
        gate_width: None: that of v.
        with_decay: there is an a. False: its width is 0.
    """
    key, value = num_key_heads * key_head_dim, num_value_heads * value_head_dim
    gate = value if gate_width is None else gate_width
    return [key, key, value, gate, num_value_heads, num_value_heads if with_decay else 0]


def causal_conv_silu(x_sbc: torch.Tensor, weight_ct: torch.Tensor, positions_bs: torch.Tensor | None) -> torch.Tensor:
    """Apply depthwise causal convolution and SiLU. The last tap multiplies the token itself."""
    length, taps = x_sbc.shape[0], weight_ct.shape[1]
    out = x_sbc * weight_ct[:, -1]
    for back in range(1, min(taps, length)):
        shifted = F.pad(x_sbc[:-back], (0, 0, 0, 0, back, 0))
        if positions_bs is not None:
            shifted = shifted.masked_fill((positions_bs < back).T[..., None], 0)
        out = out + shifted * weight_ct[:, taps - 1 - back]
    return F.silu(out)


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + L2_EPS)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """Return log(1 + e^x) without torch's threshold, whose switch to the identity at 20 fails gradcheck."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def conv_gates_torch(
    packed_sbw: torch.Tensor,
    weight_ct: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    positions_bs: torch.Tensor | None,
    halo_sbw: torch.Tensor | None,
    dims: list[int],
    beta_max: float,
) -> tuple[torch.Tensor, ...]:
    """See `hybrid_kernels.conv_gates.conv_gates`. `dims`: the arguments of `widths`."""
    key_heads, heads, key_dim, value_dim = dims[:4]
    back = 0 if halo_sbw is None else len(halo_sbw)
    if halo_sbw is not None:
        packed_sbw = torch.cat((halo_sbw, packed_sbw))
        if positions_bs is not None:
            positions_bs = F.pad(positions_bs, (back, 0))  # the results of the halo are cut off
    key, _, value, *_ = sizes = widths(*dims)
    length, batch = packed_sbw.shape[:2]
    compute = torch.float64 if packed_sbw.dtype == torch.float64 else torch.float32
    gates_at = sum(sizes[:4])

    mixed = causal_conv_silu(packed_sbw[..., : 2 * key + value].to(compute), weight_ct.to(compute), positions_bs)
    q, k, v = mixed.transpose(0, 1).split([key, key, value], dim=-1)
    q = l2_normalise(q.reshape(batch, length, key_heads, key_dim))
    k = l2_normalise(k.reshape(batch, length, key_heads, key_dim))
    v = v.reshape(batch, length, heads, value_dim)

    b, a = packed_sbw[..., gates_at : sum(sizes)].to(compute).transpose(0, 1).split(sizes[4:], dim=-1)
    gates = [torch.sigmoid(b) * beta_max]
    if A_log is not None and dt_bias is not None:
        gates.insert(0, -torch.exp(A_log.to(compute)) * softplus(a + dt_bias.to(compute)))
    dtype = packed_sbw.dtype
    results = (*(t.to(dtype) for t in (q, k, v)), *gates)
    return tuple(t[:, back:].contiguous() for t in results)
