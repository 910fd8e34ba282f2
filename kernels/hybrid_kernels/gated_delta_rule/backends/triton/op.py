"""Launches of `gated_delta_rule` in Triton. passes.py holds their order.

Layouts: q, k [b, s, key heads, K]; v, do, o [b, s, H, V]; g, beta [b, s, H]; states [n, H, K, V].
"""

from typing import Any

import torch

from hybrid_kernels.dispatch import triton_interpreted
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import CHUNK, Chunks, Scores, ends_like
from hybrid_kernels.gated_delta_rule.backends.triton.gradients import gradients_kernel
from hybrid_kernels.gated_delta_rule.backends.triton.join import processors, segments_that_pay
from hybrid_kernels.gated_delta_rule.backends.triton.prepare import prepare_kernel
from hybrid_kernels.gated_delta_rule.backends.triton.scan import forward_scan_kernel, reverse_scan_kernel
from hybrid_kernels.triton_support import tile_count

KEY_DIMS = (16, 32, 64, 96, 128, 192, 256)
States = tuple[torch.Tensor | None, torch.Tensor | None]
"""Every chunk's incoming state, and its new values."""


def unsupported_reason(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Return why these kernels cannot run a call, or None."""
    reason = None
    if q.dtype != v.dtype:
        reason = f"q and k are {q.dtype}, v is {v.dtype}"
    if reason is None and v.dtype == torch.float32 and not triton_interpreted():
        reason = "it takes bf16 and fp16, not fp32"
    if reason is None and q.shape[-1] not in KEY_DIMS:
        reason = f"key_head_dim {q.shape[-1]} is none of {', '.join(map(str, KEY_DIMS))}"
    if reason is None and v.shape[-1] % 64:
        reason = f"value_head_dim {v.shape[-1]} is not a multiple of 64"
    return reason


def segments_of(v: torch.Tensor, dim_k: int, cu_seqlens: torch.Tensor | None) -> int:
    """Return the number of segments per sequence of v [b, s, H, V].

    Packed sequences are not cut. Nor are states of more than 128 rows, because `join` keeps a transition in shared memory.
    """
    batch, length, heads, dim = v.shape
    if cu_seqlens is not None or dim_k > 128:
        return 1
    return segments_that_pay(batch * heads * (dim // 64), -(-length // CHUNK), processors(v.device))


def prepare(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, scale: float, chunks: Chunks, varlen: bool
) -> Scores:
    """Compute what does not depend on the state."""
    heads, dim = g.shape[2], k.shape[3]
    out = Scores.empty(k, heads, chunks.count, chunks.positions is not None)
    prepare_kernel[(heads, chunks.count)](
        q, k, g, beta, out.A, out.P, out.G, _or(chunks.positions, k), chunks.cu, chunks.first, chunks.sequence, scale,
        chunks.length, chunks.per_row, H=heads, HK=k.shape[2], K=dim, VARLEN=varlen,
        DOCUMENTS=chunks.positions is not None, **prepare_options(),
    )  # fmt: skip
    return out


def forward_scan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks, *, output: bool = False, final: bool = False,
    states: bool = False, transition: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, States]:  # fmt: skip
    """Scan from the first chunk to the last, for any of o, the final state (and transition) and the states of all chunks."""
    (heads, dim_v), dim_k = v.shape[2:], k.shape[3]
    o = torch.empty_like(v) if output else None
    end = ends_like(v, dim_k, chunks, transition) if final else None
    kept = chunks.states_like(v, dim_k) if states else (None, None)
    forward_scan_kernel[(dim_v // 64 + tile_count(dim_k) * transition, chunks.sequences * heads)](
        q, k, v, scores.A, scores.P, scores.G, _or(o, v), _or(kept[0], v), _or(kept[1], v), _or(initial, v),
        _or(end, v), chunks.cu, chunks.first, scale, chunks.length, chunks.per_row, chunks.segments,
        H=heads, HK=k.shape[2], K=dim_k, V=dim_v, VARLEN=cu_seqlens is not None,
        WITH_INITIAL=initial is not None, WITH_FINAL=final, WITH_OUTPUT=output, WITH_STATES=states,
        WITH_TRANSITION=transition, DOCUMENTS=chunks.positions is not None, **scan_options(dim_k),
    )  # fmt: skip
    return o, end, kept


def reverse_scan(
    q: torch.Tensor, k: torch.Tensor, do: torch.Tensor, scores: Scores, dfinal: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks, *, output: bool = True, initial: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Scan from the last chunk to the first, for dv and the gradients of every chunk's outgoing state, and of initial states."""
    (heads, dim_v), dim_k = do.shape[2:], k.shape[3]
    dv, dstates = (torch.empty_like(do), chunks.states_like(do, dim_k)[0]) if output else (None, None)
    dinitial = ends_like(do, dim_k, chunks, False) if initial else None
    reverse_scan_kernel[(dim_v // 64, chunks.sequences * heads)](
        q, k, do, scores.A, scores.P, scores.G, _or(dv, do), _or(dstates, do), _or(dfinal, do), _or(dinitial, do),
        chunks.cu, chunks.first, scale, chunks.length, chunks.per_row, chunks.segments,
        H=heads, HK=k.shape[2], K=dim_k, V=dim_v, VARLEN=cu_seqlens is not None, WITH_FINAL=dfinal is not None,
        WITH_INITIAL=initial, WITH_OUTPUT=output, DOCUMENTS=chunks.positions is not None, **scan_options(dim_k),
    )  # fmt: skip
    return dv, dstates, dinitial


def gradients(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, do: torch.Tensor, dv: torch.Tensor,
    G: torch.Tensor, states: torch.Tensor, new_values: torch.Tensor, dstates: torch.Tensor, scale: float,
    chunks: Chunks, varlen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Compute dq, dk, dg and dbeta from the results of the scans."""
    (heads, dim_v), (key_heads, dim_k) = do.shape[2:], k.shape[2:]
    dq, dk = (k.new_empty(*k.shape[:2], heads, dim_k) for _ in range(2))
    parts = tile_count(dim_k)
    dg, dbeta = torch.empty(parts, *g.shape, device=g.device, dtype=torch.float32), torch.empty_like(beta)
    gradients_kernel[(parts, heads, chunks.count)](
        q, k, beta, do, dv, G, states, new_values, dstates, dq, dk, dg, dbeta, _or(chunks.positions, do), chunks.cu,
        chunks.first, chunks.sequence, scale, chunks.length, chunks.per_row, g.numel(), 1, H=heads, HK=key_heads,
        K=dim_k, V=dim_v, VARLEN=varlen, DOCUMENTS=chunks.positions is not None, **gradients_options(),
    )  # fmt: skip
    if heads != key_heads:
        dq, dk = (x.unflatten(2, (key_heads, -1)).sum(3) for x in (dq, dk))
    return dq, dk, dg.sum(0).to(g.dtype), dbeta


def prepare_options() -> dict[str, Any]:
    return dict(num_warps=2, num_stages=1)


def scan_options(key_dim: int) -> dict[str, Any]:
    return dict(num_warps=4 if key_dim <= 128 else 8, num_stages=3 if key_dim <= 128 else 2)


def gradients_options() -> dict[str, Any]:
    """Avoid num_stages=1: Triton 3.6 then computes wrong dk and dg on Hopper and reads out of bounds. A loop over a single tile
    of values, which it unrolls, has the same defect.
    """
    return dict(num_warps=4, num_stages=3)


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """Return a pointer for a kernel argument; `stand_in` where a constexpr flag says that it is unused."""
    return stand_in if tensor is None else tensor
