"""conv_gates: from the packed in_proj output to what the gated delta rule eats."""

import torch

from ..dispatch import Choice, choose, missing_for_triton
from ..slices import several
from .reference import conv_gates_torch, widths

__all__ = ["conv_gates", "explain", "widths"]


def conv_gates(
    packed_sbh: torch.Tensor,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    num_key_heads: int,
    num_value_heads: int,
    key_head_dim: int,
    value_head_dim: int,
    allow_negative_eigenvalues: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    group=None,
    return_gate: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, ...]:
    """Causal depthwise conv + SiLU + L2 norm of q and k, and the gates g and beta. Differentiable.

    Args:
        packed_sbh: [s, b, W] this rank's in_proj output, on the last dimension
            [q | k | v | gate | b | a | padding] of widths Hk*dk, Hk*dk, Hv*dv, Hv*dv, Hv, Hv and the rest.
        conv_weight: [2*Hk*dk + Hv*dv, taps], channels of q, then k, then v; the last tap meets the token itself.
        A_log, dt_bias: [Hv], kept in fp32.
        allow_negative_eigenvalues: beta in (0, 2) rather than (0, 1).
        cu_seqlens: [n + 1] int document boundaries from 0 to s, needs b == 1; the conv does not cross them.
        group: the torch.distributed group whose ranks hold one slice each of every sequence, in rank order, of at least
            taps - 1 tokens: the conv sees the last of the rank before. No documents then. None: whole sequences.
        return_gate: also return the gate slice of `packed_sbh` as a sixth result, [s, b, Hv*dv]. Slicing it
            yourself is equal, but costs autograd one more pass over a gradient as wide as `packed_sbh`.

    Returns:
        q, k [b, s, Hk, dk] with unit L2 norm, v [b, s, Hv, dv], in packed_sbh's dtype;
        g [b, s, Hv] fp32 (log decay, <= 0) and beta [b, s, Hv] fp32; then the gate if asked for.

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    heads = dict(
        num_key_heads=num_key_heads, num_value_heads=num_value_heads,
        key_head_dim=key_head_dim, value_head_dim=value_head_dim,
    )  # fmt: skip
    group = several(group)
    _check(packed_sbh, conv_weight, A_log, dt_bias, cu_seqlens, group, **heads)
    choice = explain(packed_sbh, conv_weight, cu_seqlens=cu_seqlens, backend=backend, **heads)
    options = dict(heads, allow_negative_eigenvalues=allow_negative_eigenvalues, cu_seqlens=cu_seqlens, group=group)
    if choice.backend == "triton":
        from .triton_op import conv_gates_triton

        return conv_gates_triton(packed_sbh, conv_weight, A_log, dt_bias, return_gate=return_gate, **options)
    results = conv_gates_torch(packed_sbh, conv_weight, A_log, dt_bias, **options)
    if return_gate:
        start = 2 * num_key_heads * key_head_dim + num_value_heads * value_head_dim
        results += (packed_sbh[..., start : start + num_value_heads * value_head_dim],)
    return results


def explain(packed_sbh: torch.Tensor, conv_weight: torch.Tensor, *, backend: str | None = None, **options) -> Choice:
    """Which backend a call would run, and why; takes the arguments of `conv_gates`."""
    backends = {"triton": lambda: _missing_for_triton(packed_sbh, conv_weight, **options), "torch": lambda: None}
    return choose("conv_gates", backends, backend)


def _missing_for_triton(packed, conv_weight, *, num_value_heads, key_head_dim, value_head_dim, **_) -> str | None:
    lack = missing_for_triton(packed, conv_weight)
    if lack is None:
        from .triton_op import missing

        lack = missing(conv_weight.shape[1], num_value_heads, key_head_dim, value_head_dim)
    return lack


def _check(packed, conv_weight, A_log, dt_bias, cu_seqlens, group, **heads) -> None:
    if packed.dim() != 3:
        raise ValueError(f"packed_sbh: expected [s, b, W], got shape {tuple(packed.shape)}")
    sizes = widths(**heads)
    if packed.shape[-1] < sum(sizes):
        raise ValueError(f"packed_sbh: last dimension {packed.shape[-1]} is less than q+k+v+gate+b+a = {sum(sizes)}")
    if conv_weight.dim() != 2 or conv_weight.shape[0] != sum(sizes[:3]):
        raise ValueError(f"conv_weight: expected [{sum(sizes[:3])}, taps], got {tuple(conv_weight.shape)}")
    if heads["num_value_heads"] % heads["num_key_heads"]:
        raise ValueError(
            f"num_value_heads {heads['num_value_heads']} must be a multiple of num_key_heads {heads['num_key_heads']}"
        )
    for name, t in (("A_log", A_log), ("dt_bias", dt_bias)):
        if tuple(t.shape) != (heads["num_value_heads"],):
            raise ValueError(f"{name}: expected [{heads['num_value_heads']}], got {tuple(t.shape)}")
    if cu_seqlens is not None and packed.shape[1] != 1:
        raise ValueError(f"cu_seqlens: packed documents need batch size 1, got {packed.shape[1]}")
    if group is not None and cu_seqlens is not None:
        raise ValueError("group: slices of sequences take no cu_seqlens")
    if group is not None and len(packed) < conv_weight.shape[1] - 1:
        raise ValueError(
            f"packed_sbh: a slice of {len(packed)} tokens is shorter than the {conv_weight.shape[1] - 1} that the next one's "
            "convolution looks back on"
        )
