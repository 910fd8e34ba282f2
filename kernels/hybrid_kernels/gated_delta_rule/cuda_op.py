"""The kernels in CUDA C++ (hopper_*.cu): built by nvcc at their first use, kept on disk, called by ctypes."""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import torch

from .gluon_op import aligned
from .triton_join import processors
from .triton_op import Chunks, Scores, ends_like, segments_of

COMPILED = [Path(__file__).with_name(f"hopper_{name}.cu") for name in ("prepare", "scan", "reverse")]
SOURCES = [*COMPILED, *sorted(Path(__file__).parent.glob("hopper_*.cuh"))]
OPTIONS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC"]
POINTERS = ("G", "begin", "end", "out", "cu", "first_chunk")
PROCESSORS_A_BLOCK = 3.5
"""From so many on, sequences are cut: at 15 heads one pass of these scans is faster than two of Gluon's over segments, at 8 not."""
COUNTS = ("length", "chunks", "segments", "heads", "key_heads", "values")


class Arguments(ctypes.Structure):
    """`Arguments` of hopper_scan.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS), ("scale", ctypes.c_float), *((name, ctypes.c_int) for name in COUNTS),
    ]  # fmt: skip


class Sizes(ctypes.Structure):
    """`Sizes` of hopper_prepare.cu."""

    _fields_ = [
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("length", "chunks", "heads", "key_heads")),
    ]


def missing(q: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> str | None:
    """Why other kernels do a call that "hopper" runs, or None. The first time it builds, some seconds."""
    if (q.shape[-1], v.shape[-1]) != (96, 192):
        return f"they take heads of 96 and 192, not {q.shape[-1]} and {v.shape[-1]}"
    if cu_seqlens is not None:
        return "they do not take documents"
    return _built()[1]


def slower_scans(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why Gluon's scans are faster than those here, where they were measured to be, or None."""
    blocks, room = v.shape[0] * v.shape[2] * (v.shape[3] // 64), processors(v.device)
    if room >= PROCESSORS_A_BLOCK * blocks:
        segments = segments_of(v, q.shape[-1], None)
        if segments > 1:
            return f"two passes over {segments} segments of each sequence take less time than one over all of it"
    if room < blocks <= 2 * room:
        return f"{blocks} blocks are one round on {room} multiprocessors, and two of CUDA's"
    return None


def nvcc() -> str | None:
    """The CUDA compiler: $CUDA_HOME's, the one on the PATH, /usr/local/cuda's, or that of pip's nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME")
    pip = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu1*/bin/nvcc"), reverse=True)
    found = [home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", *map(str, pip)]
    return next((path for path in found if path and os.access(path, os.X_OK)), None)


def build(compiler: str) -> Path:
    """The library's path in Triton's cache folder, compiled unless it is there. One process at a time compiles.

    Raises:
        RuntimeError: nvcc fails; the message ends as its output does.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("".join([version, *OPTIONS, *(path.read_text() for path in SOURCES)]).encode()).hexdigest()
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache") / "hybrid_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"gated_delta_rule-{key[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            part = library.with_suffix(".part")
            command = [compiler, *OPTIONS, "-o", str(part), *map(str, COMPILED)]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                raise RuntimeError(f"{' '.join(command)}: {(ran.stderr or ran.stdout)[-1000:].strip()}")
            part.rename(library)
    return library


@cache
def _built() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none. Asked once a process: what cannot be built is not tried at every call."""
    compiler = nvcc()
    if compiler is None:
        return None, "nvcc was not found ($CUDA_HOME, PATH, /usr/local/cuda, pip's nvidia-cuda-nvcc)"
    try:
        library = ctypes.CDLL(str(build(compiler)))
    except (RuntimeError, OSError) as error:
        return None, f"they could not be built: {error}"
    pointer, long = ctypes.c_void_p, ctypes.c_long
    for function, tensors in ((library.forward_scan, 7), (library.reverse_scan, 6)):
        function.argtypes = [*[pointer] * tensors, ctypes.POINTER(Arguments), long, long, ctypes.c_int, pointer]
        function.restype = ctypes.c_char_p
    library.prepare.argtypes = [*[pointer] * 7, ctypes.POINTER(Sizes), ctypes.c_int, pointer]
    library.prepare.restype = ctypes.c_char_p
    return library, None


def prepare(q, k, g, beta, scale, chunks: Chunks, varlen: bool) -> Scores:
    """`prepare` of triton_op, without documents."""
    assert not varlen, "documents are left to Triton"
    q, k = aligned(q, k)
    heads, key_heads = g.shape[2], k.shape[2]
    out = Scores.empty(k, heads, chunks.count)
    tensors = (q, k, g.float(), beta.float(), out.A, out.P, out.G)
    _call("prepare", k, tensors, Sizes(scale, chunks.length, chunks.per_row, heads, key_heads), chunks.count)
    return out


def forward_scan(q, k, v, scores, initial, cu_seqlens, scale, chunks, *, output=False, final=False, states=False):
    """`forward_scan` of triton_op, without transitions."""
    assert output or states, "Gluon's forward scan is for final states alone"
    q, k, v = aligned(q, k, v)
    dim_k = k.shape[3]
    o = torch.empty_like(v) if output else None
    end = ends_like(v, dim_k, chunks, False) if final else None
    kept = chunks.states_like(v, dim_k) if states else (None, None)
    _launch("forward_scan", (q, k, v, scores.A, scores.P, *kept), scores, (initial, end, o), cu_seqlens, scale, chunks)
    return o, end, kept


def reverse_scan(q, k, do, scores, dfinal, cu_seqlens, scale, chunks, *, initial=False):
    """`reverse_scan` of triton_op, with its outputs."""
    q, k, do = aligned(q, k, do)
    dim_k = k.shape[3]
    dv, dstates = torch.empty_like(do), chunks.states_like(do, dim_k)[0]
    dinitial = ends_like(do, dim_k, chunks, False) if initial else None
    tensors = (q, k, do, scores.A, scores.P, dstates)
    _launch("reverse_scan", tensors, scores, (dfinal, dinitial, dv), cu_seqlens, scale, chunks)
    return dv, dstates, dinitial


def _launch(name, tensors, scores, carried, cu_seqlens, scale, chunks):
    """`carried`: what the state is before the scan, where it goes after it, and what is written by tokens; each may be None."""
    begin, end, out = carried
    k, v = tensors[1:3]
    begin = begin if begin is None else begin.float()
    documents = (None, None) if cu_seqlens is None else (chunks.cu, chunks.first)
    args = Arguments(
        *map(_pointer, (scores.G, begin, end, out, *documents)), scale, chunks.length, chunks.per_row, chunks.segments,
        v.shape[2], k.shape[2], v.shape[3],
    )  # fmt: skip
    _call(name, v, tensors, args, v.shape[0] * v.shape[1], chunks.count * v.shape[2], chunks.sequences)


def _call(name, beside, tensors, args, *counts) -> None:
    """On the device of `beside`, in its current stream."""
    with torch.cuda.device_of(beside):
        stream = torch.cuda.current_stream().cuda_stream
        error = getattr(_built()[0], name)(*map(_pointer, tensors), ctypes.byref(args), *counts, stream)
    if error:
        raise RuntimeError(f"the {name.replace('_', ' ')} of gated_delta_rule: {error.decode()}")


def _pointer(x: torch.Tensor | None) -> int | None:
    return x if x is None else x.data_ptr()
