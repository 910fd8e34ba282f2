"""gated_delta_rule in Triton: launches and autograd. The kernels: triton_prepare, triton_scan, triton_gradients.

Forward: prepare (chunk-parallel), then one scan that also writes o. Backward: what was not saved again, the reverse
scan, then one chunk-parallel kernel for dq, dk, dg and dbeta. Every sum has a fixed order.
"""

import sys
from dataclasses import dataclass

import torch

from ..dispatch import missing_for_triton, triton_interpreted
from ..triton_support import tile_count
from .triton_gradients import gradients_kernel
from .triton_prepare import prepare_kernel
from .triton_scan import forward_scan_kernel, reverse_scan_kernel

CHUNK = 64


def missing(q, v, initial_state=None) -> str | None:
    """What this backend lacks for a call, or None."""
    lack = missing_for_triton(q, v)
    if lack is None and v.dtype != torch.bfloat16 and not triton_interpreted():
        lack = f"it takes bf16, not {v.dtype}"
    if lack is None and q.shape[-1] not in (16, 32, 64, 96, 128, 192, 256):
        lack = f"key_head_dim {q.shape[-1]} is none of 16, 32, 64, 96, 128, 192, 256"
    if lack is None and v.shape[-1] % 64:
        lack = f"value_head_dim {v.shape[-1]} is not a multiple of 64"
    return lack


@dataclass(frozen=True)
class Chunks:
    """Where chunks of 64 tokens lie. With documents, all of it stays on the device: `count` is only a bound."""

    sequences: int
    length: int
    count: int
    cu: torch.Tensor  # [n + 2] document bounds, the last repeated, so that chunks past the end find an empty document
    first: torch.Tensor  # [n + 1] first chunk of each document
    document: torch.Tensor  # [count] document of each chunk; n past the last

    @property
    def per_row(self) -> int:
        return -(-self.length // CHUNK)

    @classmethod
    def of(cls, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> "Chunks":
        batch, length = v.shape[:2]
        if cu_seqlens is None:
            return cls(batch, length, batch * -(-length // CHUNK), v, v, v)  # tables unused
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
    """What `prepare_kernel` writes: A, P [chunks, H, 64, 64] and G [chunks, H, 64] in units of log 2."""

    A: torch.Tensor
    P: torch.Tensor
    G: torch.Tensor


def prepare(q, k, g, beta, scale, chunks: Chunks, varlen: bool) -> Scores:
    heads, dim = g.shape[2], k.shape[3]
    square = (chunks.count, heads, CHUNK, CHUNK)
    out = Scores(
        k.new_empty(square), k.new_empty(square), torch.empty(square[:3], device=k.device, dtype=torch.float32)
    )
    prepare_kernel[(heads, chunks.count)](
        q, k, g, beta, out.A, out.P, out.G, chunks.cu, chunks.first, chunks.document, scale, chunks.length,
        chunks.per_row, H=heads, HK=k.shape[2], K=dim, VARLEN=varlen, WITH_P=True, **prepare_options(),
    )  # fmt: skip
    return out


def forward_scan(q, k, v, scores, initial, cu_seqlens, scale, chunks, *, output, final, states):
    """The scan from the first chunk to the last, for any of o, the final state, and (states, new_values)."""
    (heads, dim_v), dim_k = v.shape[2:], k.shape[3]
    o = torch.empty_like(v) if output else None
    end = v.new_empty(chunks.sequences, heads, dim_k, dim_v, dtype=torch.float32) if final else None
    kept = chunks.states_like(v, dim_k) if states else (None, None)
    forward_scan_kernel[(dim_v // 64, chunks.sequences * heads)](
        q, k, v, scores.A, scores.P, scores.G, _or(o, v), _or(kept[0], v), _or(kept[1], v), _or(initial, v),
        _or(end, v), chunks.cu, chunks.first, scale, chunks.length, chunks.per_row,
        H=heads, HK=k.shape[2], K=dim_k, V=dim_v, VARLEN=cu_seqlens is not None, WITH_INITIAL=initial is not None,
        WITH_FINAL=final, WITH_OUTPUT=output, WITH_STATES=states, **scan_options(dim_k),
    )  # fmt: skip
    return o, end, kept


def backward_scans(q, k, v, do, scores, initial, dfinal, cu_seqlens, scale, chunks, kept):
    """(states, new_values) if they were not kept, dv, the gradient of every chunk's outgoing state, and dinitial."""
    (heads, dim_v), dim_k = do.shape[2:], k.shape[3]
    if kept[0] is None:
        kept = forward_scan(
            q, k, v, scores, initial, cu_seqlens, scale, chunks, output=False, final=False, states=True
        )[2]
    dv, dstates = torch.empty_like(do), torch.empty_like(kept[0])
    dinitial = None if initial is None else torch.empty_like(initial, dtype=torch.float32)
    reverse_scan_kernel[(dim_v // 64, chunks.sequences * heads)](
        q, k, do, scores.A, scores.P, scores.G, dv, dstates, _or(dfinal, do), _or(dinitial, do), chunks.cu,
        chunks.first, scale, chunks.length, chunks.per_row, H=heads, HK=k.shape[2], K=dim_k, V=dim_v,
        VARLEN=cu_seqlens is not None, WITH_FINAL=dfinal is not None, WITH_INITIAL=initial is not None,
        **scan_options(dim_k),
    )  # fmt: skip
    return kept, dv, dstates, dinitial


class GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, initial, cu_seqlens, scale, output_final, save, hopper):
        q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
        initial = initial if initial is None else initial.contiguous()
        chunks = Chunks.of(v, cu_seqlens)
        scores = prepare(q, k, g, beta, scale, chunks, cu_seqlens is not None)
        o, final, kept = _scans(hopper).forward_scan(
            q, k, v, scores, initial, cu_seqlens, scale, chunks, output=True, final=output_final,
            states=save == "states",
        )  # fmt: skip
        kept_scores = (None,) * 3 if save == "inputs" else (scores.A, scores.P, scores.G)
        ctx.save_for_backward(q, k, v, g, beta, initial, cu_seqlens, *kept_scores, *kept)
        ctx.scale, ctx.hopper = scale, hopper
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    def backward(ctx, do, dfinal):
        q, k, v, g, beta, initial, cu_seqlens, A, P, G, *kept = ctx.saved_tensors
        (heads, dim_v), (key_heads, dim_k), scale = v.shape[2:], k.shape[2:], ctx.scale
        do = torch.zeros_like(v) if do is None else do.contiguous()
        dfinal = dfinal if dfinal is None else dfinal.contiguous()
        chunks = Chunks.of(v, cu_seqlens)
        scores = Scores(A, P, G)
        if A is None:
            scores = prepare(q, k, g, beta, scale, chunks, cu_seqlens is not None)
        kept, dv, dstates, dinitial = _scans(ctx.hopper).backward_scans(
            q, k, v, do, scores, initial, dfinal, cu_seqlens, scale, chunks, kept
        )
        dq, dk = (k.new_empty(*k.shape[:2], heads, dim_k) for _ in range(2))
        parts = tile_count(dim_k)
        dg, dbeta = torch.empty(parts, *g.shape, device=g.device, dtype=torch.float32), torch.empty_like(beta)
        gradients_kernel[(parts, heads, chunks.count)](
            q, k, beta, do, dv, scores.G, *kept, dstates, dq, dk, dg, dbeta, chunks.cu, chunks.first, chunks.document,
            scale, chunks.length, chunks.per_row, g.numel(), H=heads, HK=key_heads, K=dim_k, V=dim_v,
            VARLEN=cu_seqlens is not None, **gradients_options(),
        )  # fmt: skip
        dg = dg.sum(0).to(g.dtype)
        if heads != key_heads:
            dq, dk = (x.unflatten(2, (key_heads, -1)).sum(3) for x in (dq, dk))
        if dinitial is not None:
            dinitial = dinitial.to(initial.dtype)
        return dq, dk, dv, dg, dbeta, dinitial, None, None, None, None, None


def _scans(hopper: bool):
    """The module whose scans to launch."""
    if hopper:
        from . import gluon_op

        return gluon_op
    return sys.modules[__name__]


def prepare_options() -> dict:
    return dict(num_warps=2, num_stages=1)


def scan_options(key_dim: int) -> dict:
    return dict(num_warps=4 if key_dim <= 128 else 8, num_stages=3 if key_dim <= 128 else 2)


def gradients_options() -> dict:
    """Not num_stages=1: Triton 3.6 then computes dk and dg wrong on Hopper, and reads out of bounds."""
    return dict(num_warps=4, num_stages=3)


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A pointer for a kernel argument that a constexpr flag says is unused."""
    return stand_in if tensor is None else tensor


def gated_delta_rule_triton(
    q,
    k,
    v,
    g,
    beta,
    *,
    scale=None,
    initial_state=None,
    output_final_state=False,
    cu_seqlens=None,
    save="scores",
    hopper=False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Arguments and results: `gated_delta_rule`."""
    scale = k.shape[-1] ** -0.5 if scale is None else float(scale)
    save = save if torch.is_grad_enabled() else "inputs"
    return GatedDeltaRule.apply(q, k, v, g, beta, initial_state, cu_seqlens, scale, output_final_state, save, hopper)
