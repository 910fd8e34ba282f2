"""Launches of the kernels in CUDA C++: the functions of the same names in backends/triton/op.py, for key heads of 96.

nvcc builds the sources at the first use (nvcc.py). ctypes calls them.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from hybrid_kernels import nvcc
from hybrid_kernels.gated_delta_rule.backends.gluon.op import aligned
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks, Scores, ends_like
from hybrid_kernels.gated_delta_rule.backends.triton.join import processors
from hybrid_kernels.gated_delta_rule.backends.triton.op import States, segments_of

FOLDER = Path(__file__).parent
SOURCES = [FOLDER / f"{name}.cu" for name in ("prepare", "forward_scan", "reverse_scan")]
HEADERS = sorted(FOLDER.glob("*.cuh"))
PROCESSORS_PER_BLOCK = 3.5
"""SMs per block from which on sequences are cut: one pass of these scans beats two of Gluon's over segments at 15 heads, not at 8."""
POINTERS = ("G", "begin", "end", "out", "cu", "first_chunk")
COUNTS = ("length", "chunks", "segments", "heads", "key_heads", "values")


class Arguments(ctypes.Structure):
    """`Arguments` of scan.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS), ("scale", ctypes.c_float), *((name, ctypes.c_int) for name in COUNTS),
    ]  # fmt: skip


class Sizes(ctypes.Structure):
    """`Sizes` of prepare.cu."""

    _fields_ = [
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("length", "chunks", "heads", "key_heads")),
    ]


def unsupported_reason(q: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> str | None:
    """Return why these kernels cannot run a call of the Hopper backend, or None. The first call builds them, in seconds."""
    if (q.shape[-1], v.shape[-1]) != (96, 192):
        return f"they take heads of 96 and 192, not {q.shape[-1]} and {v.shape[-1]}"
    if cu_seqlens is not None:
        return "they do not take documents"
    return _library()[1]


def slower_scans_reason(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Return why Gluon's scans are faster than these for a call, as measured, or None."""
    blocks, room = v.shape[0] * v.shape[2] * (v.shape[3] // 64), processors(v.device)
    if room >= PROCESSORS_PER_BLOCK * blocks:
        segments = segments_of(v, q.shape[-1], None)
        if segments > 1:
            return f"two passes over {segments} segments of each sequence take less time than one over all of it"
    if room < blocks <= 2 * room:
        return f"{blocks} blocks are one round on {room} SMs, and two of CUDA's"
    return None


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, or why there is none. Cached, so that a failed build is not repeated at every call."""
    library, reason = nvcc.load("gated_delta_rule", SOURCES, HEADERS)
    if library is None:
        return None, reason
    pointer, long = ctypes.c_void_p, ctypes.c_long
    for function, tensors in ((library.forward_scan, 7), (library.reverse_scan, 6)):
        function.argtypes = [*[pointer] * tensors, ctypes.POINTER(Arguments), long, long, ctypes.c_int, pointer]
        function.restype = ctypes.c_char_p
    library.prepare.argtypes = [*[pointer] * 7, ctypes.POINTER(Sizes), ctypes.c_int, pointer]
    library.prepare.restype = ctypes.c_char_p
    return library, None


def prepare(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, scale: float, chunks: Chunks, varlen: bool
) -> Scores:
    """Run `prepare` of backends/triton/op.py, without documents."""
    assert not varlen, "documents are left to Triton"
    q, k = aligned(q, k)
    heads, key_heads = g.shape[2], k.shape[2]
    out = Scores.empty(k, heads, chunks.count)
    tensors = (q, k, g.float(), beta.float(), out.A, out.P, out.G)
    _call("prepare", k, tensors, Sizes(scale, chunks.length, chunks.per_row, heads, key_heads), chunks.count)
    return out


def forward_scan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks, *, output: bool = False, final: bool = False,
    states: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor | None, States]:  # fmt: skip
    """Run `forward_scan` of backends/triton/op.py, without transitions."""
    assert output or states, "Gluon's forward scan is for final states alone"
    q, k, v = aligned(q, k, v)
    dim_k = k.shape[3]
    o = torch.empty_like(v) if output else None
    end = ends_like(v, dim_k, chunks, False) if final else None
    kept = chunks.states_like(v, dim_k) if states else (None, None)
    _launch("forward_scan", (q, k, v, scores.A, scores.P, *kept), scores, (initial, end, o), cu_seqlens, scale, chunks)
    return o, end, kept


def reverse_scan(
    q: torch.Tensor, k: torch.Tensor, do: torch.Tensor, scores: Scores, dfinal: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks, *, initial: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Run `reverse_scan` of backends/triton/op.py, with its outputs."""
    q, k, do = aligned(q, k, do)
    dim_k = k.shape[3]
    dv, dstates = torch.empty_like(do), chunks.states_like(do, dim_k)[0]
    dinitial = ends_like(do, dim_k, chunks, False) if initial else None
    tensors = (q, k, do, scores.A, scores.P, dstates)
    _launch("reverse_scan", tensors, scores, (dfinal, dinitial, dv), cu_seqlens, scale, chunks)
    return dv, dstates, dinitial


def _launch(
    name: str, tensors: tuple[torch.Tensor | None, ...], scores: Scores, carried: tuple[torch.Tensor | None, ...],
    cu_seqlens: torch.Tensor | None, scale: float, chunks: Chunks,
) -> None:  # fmt: skip
    """Launch a scan. `carried`: the states before it and after it, and what it writes by tokens; each may be None."""
    begin, end, out = carried
    k, v = tensors[1:3]
    assert k is not None and v is not None
    begin = begin if begin is None else begin.float()
    documents = (None, None) if cu_seqlens is None else (chunks.cu, chunks.first)
    args = Arguments(
        *map(_pointer, (scores.G, begin, end, out, *documents)), scale, chunks.length, chunks.per_row, chunks.segments,
        v.shape[2], k.shape[2], v.shape[3],
    )  # fmt: skip
    _call(name, v, tensors, args, v.shape[0] * v.shape[1], chunks.count * v.shape[2], chunks.sequences)


def _call(
    name: str, like: torch.Tensor, tensors: tuple[torch.Tensor | None, ...], args: ctypes.Structure, *counts: int
) -> None:
    """Call a function of the library on the device of `like`, in its current stream."""
    with torch.cuda.device_of(like):
        stream = torch.cuda.current_stream().cuda_stream
        error = getattr(_library()[0], name)(*map(_pointer, tensors), ctypes.byref(args), *counts, stream)
    if error:
        raise RuntimeError(f"the {name.replace('_', ' ')} of gated_delta_rule: {error.decode()}")


def _pointer(x: torch.Tensor | None) -> int | None:
    return x if x is None else x.data_ptr()
