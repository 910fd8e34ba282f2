"""The forward scan in CUDA C++ (hopper_scan.cu): built by nvcc at its first use, kept on disk, called through ctypes."""

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
from .triton_op import ends_like, segments_of

SOURCES = [Path(__file__).with_name(name) for name in ("hopper_scan.cu", "hopper_ptx.cuh")]
OPTIONS = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC"]
POINTERS = ("G", "initial", "final", "o", "cu", "first_chunk")
COUNTS = ("length", "chunks", "segments", "heads", "key_heads", "values")


class Arguments(ctypes.Structure):
    """`Arguments` of hopper_scan.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS), ("scale", ctypes.c_float), *((name, ctypes.c_int) for name in COUNTS),
    ]  # fmt: skip


def missing(q: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> str | None:
    """Why Gluon's scan writes the outputs of a call that "hopper" runs, or None. The first time it builds, some seconds.

    The kernel runs other shapes as well; these are those where it was measured to be faster.
    """
    batch, _, heads, dim_v = v.shape
    if (q.shape[-1], dim_v) != (96, 192):
        return f"it takes heads of 96 and 192, not {q.shape[-1]} and {dim_v}"
    if cu_seqlens is not None:
        return "documents are left to Gluon's scan"
    if segments_of(v, q.shape[-1], None) > 1:
        return "sequences in segments are left to Gluon's scan: of its blocks, a multiprocessor runs two at once"
    blocks, room = batch * heads * (dim_v // 64), processors(v.device)
    if room < blocks <= 2 * room:
        return f"{blocks} blocks are one round of Gluon's scan on {room} multiprocessors, and two of this one"
    return _built()[1]


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
    library = folder / f"hopper_scan-{key[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            part = library.with_suffix(".part")
            command = [compiler, *OPTIONS, "-o", str(part), str(SOURCES[0])]
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
        return None, f"it could not be built: {error}"
    pointer, long = ctypes.c_void_p, ctypes.c_long
    library.forward_scan.argtypes = [*[pointer] * 5, ctypes.POINTER(Arguments), long, long, ctypes.c_int, pointer]
    library.forward_scan.restype = ctypes.c_char_p
    return library, None


def forward_scan(q, k, v, scores, initial, cu_seqlens, scale, chunks, *, output=True, final=False, states=False):
    """`forward_scan` of triton_op for the outputs, and the final state if asked for."""
    assert output and not states, "Gluon's forward scan writes states"
    q, k, v = aligned(q, k, v)
    heads, key_heads = v.shape[2], k.shape[2]
    o = torch.empty_like(v)
    end = ends_like(v, k.shape[3], chunks, False) if final else None
    initial = initial if initial is None else initial.float()
    documents = cu_seqlens is not None
    tensors = (scores.G, initial, end, o, chunks.cu if documents else None, chunks.first if documents else None)
    args = Arguments(
        *(x if x is None else x.data_ptr() for x in tensors), scale, chunks.length, chunks.per_row, chunks.segments,
        heads, key_heads, v.shape[3],
    )  # fmt: skip
    with torch.cuda.device_of(v):
        error = _built()[0].forward_scan(
            *(x.data_ptr() for x in (q, k, v, scores.A, scores.P)), ctypes.byref(args), v.shape[0] * v.shape[1],
            chunks.count * heads, chunks.sequences, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    if error:
        raise RuntimeError(f"the forward scan of gated_delta_rule: {error.decode()}")
    return o, end, (None, None)
