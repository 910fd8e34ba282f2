"""Launches of the kernels in CUDA C++ for Hopper: the functions of the same names in backends/triton/op.py, faster.

nvcc builds the sources for each key head dimension at its first use (nvcc.py). ctypes calls them.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from hybrid_kernels import nvcc
from hybrid_kernels.custom_op import constant_result
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import CHUNK, Chunks, Scores, ends_like
from hybrid_kernels.gated_delta_rule.backends.triton.join import processors, segments_that_pay
from hybrid_kernels.gated_delta_rule.backends.triton.op import States

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / f"{name}.cu" for name in ("prepare", "forward_scan", "reverse_scan", "gradients")]
HEADERS = sorted(FOLDER.glob("*.cuh"))
KEY_DIMS = (64, 96, 128)
PROCESSORS_PER_BLOCK = 3.5
"""SMs per block from which on sequences are cut: one pass is faster than two over segments at 15 heads, not at 8."""


class Arguments(ctypes.Structure):
    """`Arguments` of scan.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("G", "begin", "end", "out", "cu", "first_chunk")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("length", "chunks", "segments", "heads", "key_heads", "values", "width")),
        ("documents", ctypes.c_int),
    ]


class Sizes(ctypes.Structure):
    """`Sizes` of chunks.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cu", "first_chunk", "sequence", "positions")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("length", "chunks", "heads", "key_heads")),
    ]


class Given(ctypes.Structure):
    """`Given` of gradients.cuh."""

    _fields_ = [
        ("sizes", Sizes),
        *((name, ctypes.c_void_p) for name in ("G", "beta")),
        *((name, ctypes.c_int) for name in ("values", "count", "sequences")),
    ]


def unsupported_reason(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Return why this backend cannot run a call that "triton" can run, or None. The first call builds the kernels, in seconds."""
    if not v.is_cuda or torch.cuda.get_device_capability(v.device) != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if v.dtype != torch.bfloat16:
        return f"it takes bf16, not {v.dtype}"
    if q.shape[-1] not in KEY_DIMS:
        return f"key_head_dim {q.shape[-1]} is none of {', '.join(map(str, KEY_DIMS))}"
    if v.shape[0] * v.shape[1] * v.shape[2] >= 2**31:
        return "batch * tokens * heads must fit in 31 bits"
    reason: str | None = _unbuilt_reason(q.shape[-1])
    return reason


def segments_of(v: torch.Tensor, dim_k: int, cu_seqlens: torch.Tensor | None) -> int:
    """Return the number of segments per sequence of v [b, s, H, V]. Packed sequences are not cut."""
    batch, length, heads, dim = v.shape
    blocks, room = batch * heads * (dim // 64), processors(v.device)
    if cu_seqlens is not None or room < PROCESSORS_PER_BLOCK * blocks:
        return 1
    return segments_that_pay(blocks, -(-length // CHUNK), room)


def aligned(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copy the tensors that do not start on a 16-byte boundary, as bulk copies require."""
    return tuple(x if x.data_ptr() % 16 == 0 else x.clone() for x in tensors)


@cache
def _library(key_dim: int) -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, or why there is none. Cached, so that a failed build is not repeated at every call."""
    library, reason = nvcc.load(f"gated_delta_rule_{key_dim}", SOURCES, HEADERS, [f"KEY_DIM={key_dim}"])
    if library is None:
        return None, reason
    pointer, long = ctypes.c_void_p, ctypes.c_long
    for function, tensors in ((library.forward_scan, 7), (library.reverse_scan, 6)):
        function.argtypes = [*[pointer] * tensors, ctypes.POINTER(Arguments), long, long, ctypes.c_int, pointer]
        function.restype = ctypes.c_char_p
    library.prepare.argtypes = [*[pointer] * 7, ctypes.POINTER(Sizes), ctypes.c_int, pointer]
    library.gradients.argtypes = [*[pointer] * 11, ctypes.POINTER(Given), ctypes.c_int, pointer]
    library.prepare.restype = library.gradients.restype = ctypes.c_char_p
    return library, None


@constant_result  # so that torch.compile can trace a dispatch
def _unbuilt_reason(key_dim: int) -> str | None:
    return _library(key_dim)[1]


def prepare(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, scale: float, chunks: Chunks, varlen: bool
) -> Scores:
    """Run `prepare` of backends/triton/op.py."""
    q, k = aligned(q, k)
    heads, key_heads = g.shape[2], k.shape[2]
    out = Scores.empty(k, heads, chunks.count, chunks.positions is not None)
    tensors = (q, k, g.float(), beta.float(), out.A, out.P, out.G)
    _call("prepare", k, tensors, _sizes(scale, chunks, varlen, heads, key_heads), chunks.count)
    return out


def forward_scan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks, *, output: bool = False, final: bool = False,
    states: bool = False, transition: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, States]:  # fmt: skip
    """Run `forward_scan` of backends/triton/op.py. A transition is for final states alone."""
    assert not (transition and (output or states or initial is not None)), "blocks of a transition have no outputs"
    q, k, v = aligned(q, k, v)
    dim_k = k.shape[3]
    o = torch.empty_like(v) if output else None
    end = ends_like(v, dim_k, chunks, transition) if final else None
    kept = chunks.states_like(v, dim_k) if states else (None, None)
    tensors = (q, k, v, scores.A, scores.P, *kept)
    _launch("forward_scan", tensors, scores, (initial, end, o), cu_seqlens, scale, chunks)
    return o, end, kept


def reverse_scan(
    q: torch.Tensor, k: torch.Tensor, do: torch.Tensor, scores: Scores, dfinal: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks, *, output: bool = True, initial: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Run `reverse_scan` of backends/triton/op.py."""
    q, k, do = aligned(q, k, do)
    dim_k = k.shape[3]
    dv, dstates = (torch.empty_like(do), chunks.states_like(do, dim_k)[0]) if output else (None, None)
    dinitial = ends_like(do, dim_k, chunks, False) if initial else None
    tensors = (q, k, do, scores.A, scores.P, dstates)
    _launch("reverse_scan", tensors, scores, (dfinal, dinitial, dv), cu_seqlens, scale, chunks)
    return dv, dstates, dinitial


def gradients(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, do: torch.Tensor, dv: torch.Tensor,
    G: torch.Tensor, states: torch.Tensor, new_values: torch.Tensor, dstates: torch.Tensor, scale: float,
    chunks: Chunks, varlen: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Run `gradients` of backends/triton/op.py."""
    q, k, do, dv = aligned(q, k, do, dv)
    (heads, dim_v), (key_heads, dim_k) = do.shape[2:], k.shape[2:]
    dq, dk = (k.new_empty(*k.shape[:2], heads, dim_k) for _ in range(2))
    dg, dbeta = (torch.empty_like(x, dtype=torch.float32) for x in (g, beta))
    beta_fp32 = beta.float()
    given = Given(
        _sizes(scale, chunks, varlen, heads, key_heads), _pointer(G), _pointer(beta_fp32), dim_v, chunks.count,
        chunks.sequences,
    )  # fmt: skip
    tensors = (q, k, do, dv, states, new_values, dstates, dq, dk, dg, dbeta)
    _call("gradients", k, tensors, given, do.shape[0] * do.shape[1])
    if heads != key_heads:
        dq, dk = (x.unflatten(2, (key_heads, -1)).sum(3) for x in (dq, dk))
    return dq, dk, dg.to(g.dtype), dbeta.to(beta.dtype)


def _sizes(scale: float, chunks: Chunks, varlen: bool, heads: int, key_heads: int) -> Sizes:
    tables = (chunks.cu, chunks.first, chunks.sequence) if varlen else (None,) * 3
    pointers = map(_pointer, (*tables, chunks.positions))
    return Sizes(*pointers, scale, chunks.length, chunks.per_row, heads, key_heads)


def _launch(
    name: str, tensors: tuple[torch.Tensor | None, ...], scores: Scores, carried: tuple[torch.Tensor | None, ...],
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks,
) -> None:  # fmt: skip
    """Launch a scan. `carried`: the states before it and after it, and what it writes by tokens; each may be None."""
    begin, end, out = carried
    k, v = tensors[1:3]
    assert k is not None and v is not None
    begin = begin if begin is None else begin.float()
    tables = (None, None) if cu_seqlens is None else (chunks.cu, chunks.first)
    args = Arguments(
        *map(_pointer, (scores.G, begin, end, out, *tables)), scale, chunks.length, chunks.per_row, chunks.segments,
        v.shape[2], k.shape[2], v.shape[3], v.shape[3] if end is None else end.shape[3],
        chunks.positions is not None,
    )  # fmt: skip
    _call(name, k, tensors, args, v.shape[0] * v.shape[1], chunks.count * v.shape[2], chunks.sequences)


def _call(
    name: str, k: torch.Tensor, tensors: tuple[torch.Tensor | None, ...], args: ctypes.Structure, *counts: int
) -> None:
    """Call a function of k's library on k's device, in its current stream."""
    with torch.cuda.device_of(k):
        stream = torch.cuda.current_stream().cuda_stream
        function = getattr(_library(k.shape[3])[0], name)
        error = function(*map(_pointer, tensors), ctypes.byref(args), *counts, stream)
    if error:
        raise RuntimeError(f"the {name.replace('_', ' ')} of gated_delta_rule: {error.decode()}")


def _pointer(x: torch.Tensor | None) -> int | None:
    return x if x is None else x.data_ptr()
