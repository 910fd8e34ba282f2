"""conv_gates: from the packed output of in_proj to the inputs of the gated delta rule.

Suffixes of tensor names: b batch, s tokens, w width of the packed projection, c channels of the convolution, t its taps,
h heads, d channels of a head.
"""

import torch

from hybrid_kernels.conv_gates.reference import conv_gates_torch, widths
from hybrid_kernels.dispatch import Choice, choose, triton_unsupported_reason
from hybrid_kernels.documents import check_positions

__all__ = ["conv_gates", "explain", "widths"]


def conv_gates(
    packed_sbw: torch.Tensor,
    weight_ct: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    *,
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    gate_width: int | None = None,
    allow_negative_eigenvalues: bool = True,
    positions_bs: torch.Tensor | None = None,
    halo_sbw: torch.Tensor | None = None,
    return_gate: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Apply causal depthwise convolution, SiLU and, to q and k, L2 norm; compute the gates g and beta. Differentiable.

    Args:
        packed_sbw: this rank's in_proj output. The last dimension is [q | k | v | gate | b | a | padding] of widths
            num_key_heads * key_head_dim (twice), num_value_heads * value_head_dim (twice), num_value_heads (twice) and the rest.
        weight_ct: channels of q, then k, then v. The last tap multiplies the token itself.
        A_log, dt_bias: [num_value_heads], fp32. None, None: the projection has no a, and g is not computed.
        gate_width: width of the gate, where it differs from that of v.
        allow_negative_eigenvalues: beta in (0, 2) instead of (0, 1).
        positions_bs: position of each token in its document (hybrid_kernels/documents.py, which also converts cu_seqlens). The
            convolution looks back on tokens of the same document only, also in the halo. None: each row is one document.
        halo_sbw: the taps - 1 tokens before the first, for a sequence that continues an earlier part. None: zeros.
        return_gate: also return the gate slice of `packed_sbw`, [s, b, gate_width], as the last result.
            Slicing outside gives the same values but costs autograd another pass over a gradient as wide as `packed_sbw`.

    Returns:
        q_bshd and k_bshd with unit L2 norm, and v_bshd, in packed_sbw's dtype; g_bsh (log decay, <= 0) if there is an A_log,
        and beta_bsh in fp32; the gate if requested.

    Raises:
        ValueError: the shapes do not match, or the requested backend cannot run here.
    """
    heads = (num_key_heads, num_value_heads, key_head_dim, value_head_dim)
    dims = _dims(*heads, gate_width, with_decay=A_log is not None)
    sizes = widths(*dims)
    _check(packed_sbw, weight_ct, A_log, dt_bias, sizes, num_key_heads, num_value_heads)
    _check_sequences(packed_sbw, weight_ct, positions_bs, halo_sbw)
    beta_max = 2.0 if allow_negative_eigenvalues else 1.0
    tensors = (packed_sbw, weight_ct, A_log, dt_bias, positions_bs, halo_sbw)
    if _choose(packed_sbw, weight_ct, dims, backend).backend == "triton":
        from hybrid_kernels.conv_gates.backends.triton.op import conv_gates_triton

        return conv_gates_triton(*tensors, dims, beta_max, return_gate)
    results = conv_gates_torch(*tensors, dims, beta_max)
    return (*results, packed_sbw[..., sum(sizes[:3]) : sum(sizes[:4])]) if return_gate else results


def explain(
    packed_sbw: torch.Tensor,
    weight_ct: torch.Tensor,
    *,
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    gate_width: int | None = None,
    backend: str | None = None,
) -> Choice:
    """Return which backend a call would run, and why."""
    dims = _dims(num_key_heads, num_value_heads, key_head_dim, value_head_dim, gate_width)
    return _choose(packed_sbw, weight_ct, dims, backend)


def _dims(
    key_heads: int, heads: int, key_head_dim: int, value_head_dim: int, gate_width: int | None, with_decay: bool = True
) -> list[int]:
    """Return the arguments of `widths`, all given, as backends take them."""
    gate = heads * value_head_dim if gate_width is None else gate_width
    return [key_heads, heads, key_head_dim, value_head_dim, gate, int(with_decay)]


def _choose(packed_sbw: torch.Tensor, weight_ct: torch.Tensor, dims: list[int], requested: str | None) -> Choice:
    backends = {"triton": lambda: _triton_unsupported_reason(packed_sbw, weight_ct, dims), "torch": lambda: None}
    return choose("conv_gates", backends, requested)


def _triton_unsupported_reason(packed_sbw: torch.Tensor, weight_ct: torch.Tensor, dims: list[int]) -> str | None:
    reason = triton_unsupported_reason(packed_sbw, weight_ct)
    if reason is None:
        from hybrid_kernels.conv_gates.backends.triton.op import unsupported_reason

        reason = unsupported_reason(weight_ct.shape[1], dims)
    return reason


def _check(
    packed_sbw: torch.Tensor,
    weight_ct: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    sizes: list[int],
    num_key_heads: int,
    num_value_heads: int,
) -> None:
    if packed_sbw.dim() != 3:
        raise ValueError(f"packed_sbw: expected [s, b, w], got shape {tuple(packed_sbw.shape)}")
    if packed_sbw.shape[-1] < sum(sizes):
        width = packed_sbw.shape[-1]
        raise ValueError(f"packed_sbw: last dimension {width} is less than q+k+v+gate+b+a = {sum(sizes)}")
    if weight_ct.dim() != 2 or weight_ct.shape[0] != sum(sizes[:3]):
        raise ValueError(f"weight_ct: expected [{sum(sizes[:3])}, taps], got {tuple(weight_ct.shape)}")
    if num_value_heads % num_key_heads:
        raise ValueError(f"num_value_heads {num_value_heads} must be a multiple of num_key_heads {num_key_heads}")
    if A_log is None and dt_bias is None:
        return
    for name, t in (("A_log", A_log), ("dt_bias", dt_bias)):
        if t is None:
            raise ValueError(f"{name}: it is None; give A_log and dt_bias, or neither")
        if tuple(t.shape) != (num_value_heads,):
            raise ValueError(f"{name}: expected [{num_value_heads}], got {tuple(t.shape)}")


def _check_sequences(
    packed_sbw: torch.Tensor, weight_ct: torch.Tensor, positions_bs: torch.Tensor | None, halo_sbw: torch.Tensor | None
) -> None:
    check_positions(positions_bs, packed_sbw.shape[1], packed_sbw.shape[0])
    if halo_sbw is None:
        return
    back = weight_ct.shape[1] - 1
    expected = (back, *packed_sbw.shape[1:])
    if tuple(halo_sbw.shape) != expected:
        raise ValueError(f"halo_sbw: expected {expected}, got {tuple(halo_sbw.shape)}")
    if len(packed_sbw) < back:
        raise ValueError(
            f"packed_sbw: {len(packed_sbw)} tokens after a halo are fewer than the {back} that the convolution looks back on"
        )
