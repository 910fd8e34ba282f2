"""Launches of the scans in Gluon for Hopper: faster versions of the functions of the same names in backends/triton/op.py."""

from functools import cache
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hybrid_kernels.gated_delta_rule.backends.gluon.parts import shared
from hybrid_kernels.gated_delta_rule.backends.gluon.scan import forward_scan_kernel, reverse_scan_kernel
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks, Scores, ends_like
from hybrid_kernels.gated_delta_rule.backends.triton.op import States
from hybrid_kernels.triton_support import tile_count

OPTIONS = dict(num_warps=4)


def unsupported_reason(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Return why this backend cannot run a call that "triton" can run, or None."""
    if not v.is_cuda or torch.cuda.get_device_capability(v.device) != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if v.dtype != torch.bfloat16:
        return f"it takes bf16, not {v.dtype}"
    if q.shape[-1] not in (64, 96, 128):
        return f"key_head_dim {q.shape[-1]} is none of 64, 96, 128"
    if v.shape[0] * v.shape[1] * v.shape[2] >= 2**31:
        return "batch * tokens * heads must fit in 31 bits"
    return None


@cache
def _layout(width: int) -> Any:
    """Return a shared layout. Cached, because creating one takes longer than a launch."""
    return shared(width)


def _matrix(x: torch.Tensor | None, cols: int, width: int = 64) -> TensorDescriptor:
    """Describe x as rows of `cols` elements, copied in boxes of 64 by `width`.

    Skips the constructor, whose checks `unsupported_reason` and `aligned` have done.
    """
    assert x is not None
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = x, [x.numel() // cols, cols], [cols, 1]
    descriptor.block_shape, descriptor.layout, descriptor.padding = [64, width], _layout(width), "zero"
    return descriptor


def aligned(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copy the tensors that do not start on a 16-byte boundary, as bulk copies require."""
    return tuple(x if x.data_ptr() % 16 == 0 else x.clone() for x in tensors)


def _keyed(x: torch.Tensor | None, cols: int, dim: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Return descriptors with boxes of 64 columns, and of the remainder of `dim` after the last 64 (or 64 again)."""
    return _matrix(x, cols), _matrix(x, cols, dim % 64 or 64)


def forward_scan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks, *, output: bool = False, final: bool = False,
    states: bool = False, transition: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, States]:  # fmt: skip
    q, k, v = aligned(q, k, v)
    (heads, dim_v), (key_heads, dim_k) = v.shape[2:], k.shape[2:]
    o = torch.empty_like(v) if output else None
    end = ends_like(v, dim_k, chunks, transition) if final else None
    kept = chunks.states_like(v, dim_k) if states else (None, None)
    wide = _matrix(v, heads * dim_v)
    keyed = [*_keyed(q, key_heads * dim_k, dim_k), *_keyed(k, key_heads * dim_k, dim_k)]
    kept_desc = [*_keyed(kept[0], dim_k, dim_k), _matrix(kept[1], 64)] if states else [wide, wide, wide]
    forward_scan_kernel[(dim_v // 64 + tile_count(dim_k) * transition, chunks.sequences * heads)](
        *keyed, wide, _matrix(scores.A, 64), _matrix(scores.P, 64), _matrix(o, heads * dim_v) if output else wide,
        *kept_desc, scores.G, o if output else v, v if initial is None else initial, v if end is None else end,
        chunks.cu, chunks.first, scale, chunks.length, chunks.per_row, chunks.segments, H=heads, HK=key_heads, K=dim_k, V=dim_v,
        VARLEN=cu_seqlens is not None, WITH_INITIAL=initial is not None, WITH_FINAL=final,
        WITH_OUTPUT=output, WITH_STATES=states, WITH_TRANSITION=transition, **OPTIONS,
    )  # fmt: skip
    return o, end, kept


def reverse_scan(
    q: torch.Tensor, k: torch.Tensor, do: torch.Tensor, scores: Scores, dfinal: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks, *, output: bool = True, initial: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    q, k, do = aligned(q, k, do)
    (heads, dim_v), (key_heads, dim_k) = do.shape[2:], k.shape[2:]
    dv, dstates = (torch.empty_like(do), chunks.states_like(do, dim_k)[0]) if output else (None, None)
    dinitial = ends_like(do, dim_k, chunks, False) if initial else None
    wide = _matrix(do, heads * dim_v)
    out = [_matrix(dv, heads * dim_v), *_keyed(dstates, dim_k, dim_k)] if output else [wide, wide, wide]
    reverse_scan_kernel[(dim_v // 64, chunks.sequences * heads)](
        *_keyed(q, key_heads * dim_k, dim_k), *_keyed(k, key_heads * dim_k, dim_k), wide, _matrix(scores.A, 64),
        _matrix(scores.P, 64), *out, scores.G, dv if output else do, do if dfinal is None else dfinal,
        do if dinitial is None else dinitial, chunks.cu, chunks.first, scale, chunks.length, chunks.per_row, chunks.segments,
        H=heads, HK=key_heads, K=dim_k, V=dim_v, VARLEN=cu_seqlens is not None,
        WITH_FINAL=dfinal is not None, WITH_INITIAL=initial, WITH_OUTPUT=output, **OPTIONS,
    )  # fmt: skip
    return dv, dstates, dinitial
