"""gated_delta_rule in Triton: what lies where, and the launches. The order of the launches is in autograd.py."""

from dataclasses import dataclass

import torch

from ..dispatch import missing_for_triton, triton_interpreted
from ..triton_support import tile_count
from .triton_gradients import gradients_kernel
from .triton_join import processors, segments_that_pay
from .triton_prepare import prepare_kernel
from .triton_scan import forward_scan_kernel, reverse_scan_kernel

CHUNK = 64


def missing(q, v) -> str | None:
    """What this backend lacks for a call, or None."""
    lack = missing_for_triton(q, v)
    if lack is None and q.dtype != v.dtype:
        lack = f"q and k are {q.dtype}, v is {v.dtype}"
    if lack is None and v.dtype == torch.float32 and not triton_interpreted():
        lack = "it takes bf16 and fp16, not fp32"
    if lack is None and q.shape[-1] not in (16, 32, 64, 96, 128, 192, 256):
        lack = f"key_head_dim {q.shape[-1]} is none of 16, 32, 64, 96, 128, 192, 256"
    if lack is None and v.shape[-1] % 64:
        lack = f"value_head_dim {v.shape[-1]} is not a multiple of 64"
    return lack


def segments_of(v: torch.Tensor, dim_k: int, cu_seqlens: torch.Tensor | None) -> int:
    """Into how many segments the scans cut every sequence of v [b, s, H, dv].

    Documents are not cut, nor are states of more than 128 rows: `join` keeps a transition in shared memory.
    """
    batch, length, heads, dim = v.shape
    if cu_seqlens is not None or dim_k > 128:
        return 1
    return segments_that_pay(batch * heads * (dim // 64), -(-length // CHUNK), processors(v.device))


@dataclass(frozen=True)
class Chunks:
    """Where chunks of 64 tokens lie. With documents, all of it stays on the device: `count` is only a bound."""

    sequences: int  # chains that the scans run: documents, or segments of batch rows
    length: int
    count: int
    cu: torch.Tensor  # [n + 2] document bounds, the last repeated, so that chunks past the end find an empty document
    first: torch.Tensor  # [n + 1] first chunk of each document
    document: torch.Tensor  # [count] document of each chunk; n past the last
    segments: int = 1  # of a batch row

    @property
    def per_row(self) -> int:
        return -(-self.length // CHUNK)

    @classmethod
    def of(cls, v: torch.Tensor, cu_seqlens: torch.Tensor | None, segments: int = 1) -> "Chunks":
        batch, length = v.shape[:2]
        if cu_seqlens is None:
            return cls(batch * segments, length, batch * -(-length // CHUNK), v, v, v, segments)  # tables unused
        n = cu_seqlens.numel() - 1
        cu = torch.cat([cu_seqlens, cu_seqlens[-1:]]).to(v.device, torch.int32)
        ends = ((cu[1:-1] - cu[:-2] + CHUNK - 1) // CHUNK).cumsum(0, dtype=torch.int32)
        count = length // CHUNK + min(n, length)
        document = torch.searchsorted(ends, torch.arange(count, device=v.device, dtype=torch.int32), right=True)
        first = torch.cat([ends.new_zeros(1), ends])
        return cls(n, length, count, cu, first, document.to(torch.int32))

    def states_like(self, v: torch.Tensor, key_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for every chunk's incoming S^T [chunks, H, V, K] and its new values [chunks, H, V, 64]."""
        heads, dim = v.shape[2:]
        return v.new_empty(self.count, heads, dim, key_dim), v.new_empty(self.count, heads, dim, CHUNK)


@dataclass(frozen=True)
class Scores:
    """What `prepare_kernel` writes: A (fp16), P [chunks, H, 64, 64] and G [chunks, H, 64] in units of log 2."""

    A: torch.Tensor
    P: torch.Tensor
    G: torch.Tensor

    @classmethod
    def empty(cls, k: torch.Tensor, heads: int, count: int) -> "Scores":
        square = (count, heads, CHUNK, CHUNK)
        half = torch.float32 if k.dtype == torch.float32 else torch.float16
        return cls(
            k.new_empty(square, dtype=half), k.new_empty(square), k.new_empty(square[:3], dtype=torch.float32)
        )  # fmt: skip


def prepare(q, k, g, beta, scale, chunks: Chunks, varlen: bool) -> Scores:
    heads, dim = g.shape[2], k.shape[3]
    out = Scores.empty(k, heads, chunks.count)
    prepare_kernel[(heads, chunks.count)](
        q, k, g, beta, out.A, out.P, out.G, chunks.cu, chunks.first, chunks.document, scale, chunks.length,
        chunks.per_row, H=heads, HK=k.shape[2], K=dim, VARLEN=varlen, WITH_P=True, **prepare_options(),
    )  # fmt: skip
    return out


def ends_like(v: torch.Tensor, dim_k: int, chunks: Chunks, transition: bool) -> torch.Tensor:
    """Room for the final states [n, H, K, V], with their transitions beside them if asked for."""
    heads, dim_v = v.shape[2:]
    width = dim_v + 64 * tile_count(dim_k) * transition
    return v.new_empty(chunks.sequences, heads, dim_k, width, dtype=torch.float32)


def forward_scan(
    q, k, v, scores, initial, cu_seqlens, scale, chunks, *, output=False, final=False, states=False, transition=False
):
    """The scan from the first chunk to the last, for any of o, the final state and (states, new_values)."""
    (heads, dim_v), dim_k = v.shape[2:], k.shape[3]
    o = torch.empty_like(v) if output else None
    end = ends_like(v, dim_k, chunks, transition) if final else None
    kept = chunks.states_like(v, dim_k) if states else (None, None)
    forward_scan_kernel[(dim_v // 64 + tile_count(dim_k) * transition, chunks.sequences * heads)](
        q, k, v, scores.A, scores.P, scores.G, _or(o, v), _or(kept[0], v), _or(kept[1], v), _or(initial, v),
        _or(end, v), chunks.cu, chunks.first, scale, chunks.length, chunks.per_row, chunks.segments,
        H=heads, HK=k.shape[2], K=dim_k, V=dim_v, VARLEN=cu_seqlens is not None,
        WITH_INITIAL=initial is not None, WITH_FINAL=final, WITH_OUTPUT=output, WITH_STATES=states,
        WITH_TRANSITION=transition, **scan_options(dim_k),
    )  # fmt: skip
    return o, end, kept


def reverse_scan(q, k, do, scores, dfinal, cu_seqlens, scale, chunks, *, output=True, initial=False):
    """dv and the gradient of every chunk's outgoing state, if asked for, and the gradient of the initial states."""
    (heads, dim_v), dim_k = do.shape[2:], k.shape[3]
    dv, dstates = (torch.empty_like(do), chunks.states_like(do, dim_k)[0]) if output else (None, None)
    dinitial = ends_like(do, dim_k, chunks, False) if initial else None
    reverse_scan_kernel[(dim_v // 64, chunks.sequences * heads)](
        q, k, do, scores.A, scores.P, scores.G, _or(dv, do), _or(dstates, do), _or(dfinal, do), _or(dinitial, do),
        chunks.cu, chunks.first, scale, chunks.length, chunks.per_row, chunks.segments, H=heads, HK=k.shape[2], K=dim_k, V=dim_v,
        VARLEN=cu_seqlens is not None, WITH_FINAL=dfinal is not None, WITH_INITIAL=initial,
        WITH_OUTPUT=output, **scan_options(dim_k),
    )  # fmt: skip
    return dv, dstates, dinitial


def gradients(q, k, g, beta, do, dv, G, states, new_values, dstates, scale, chunks: Chunks, varlen: bool):
    """dq, dk, dg and dbeta from what the scans left."""
    (heads, dim_v), (key_heads, dim_k) = do.shape[2:], k.shape[2:]
    dq, dk = (k.new_empty(*k.shape[:2], heads, dim_k) for _ in range(2))
    parts = tile_count(dim_k)
    dg, dbeta = torch.empty(parts, *g.shape, device=g.device, dtype=torch.float32), torch.empty_like(beta)
    gradients_kernel[(parts, heads, chunks.count)](
        q, k, beta, do, dv, G, states, new_values, dstates, dq, dk, dg, dbeta, chunks.cu, chunks.first, chunks.document,
        scale, chunks.length, chunks.per_row, g.numel(), 1, H=heads, HK=key_heads, K=dim_k, V=dim_v, VARLEN=varlen,
        **gradients_options(),
    )  # fmt: skip
    if heads != key_heads:
        dq, dk = (x.unflatten(2, (key_heads, -1)).sum(3) for x in (dq, dk))
    return dq, dk, dg.sum(0).to(g.dtype), dbeta


def prepare_options() -> dict:
    return dict(num_warps=2, num_stages=1)


def scan_options(key_dim: int) -> dict:
    return dict(num_warps=4 if key_dim <= 128 else 8, num_stages=3 if key_dim <= 128 else 2)


def gradients_options() -> dict:
    """Not num_stages=1: Triton 3.6 then computes dk and dg wrong on Hopper, and reads out of bounds. A loop over a single tile
    of values, which it unrolls, is no better."""
    return dict(num_warps=4, num_stages=3)


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A pointer for a kernel argument that a constexpr flag says is unused."""
    return stand_in if tensor is None else tensor
