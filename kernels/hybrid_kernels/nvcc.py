"""Shared libraries of CUDA C++ sources: built by nvcc at the first use, cached on disk, called through ctypes.

torch.utils.cpp_extension needs ninja and compiles torch's headers with each extension. These kernels take pointers and sizes only, so
they need neither.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

OPTIONS = ("-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC")


def find_nvcc() -> str | None:
    """Return the CUDA compiler of $CUDA_HOME, the PATH, /usr/local/cuda or pip's nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME")
    pip = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu1*/bin/nvcc"), reverse=True)
    found = [home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc", *map(str, pip)]
    return next((path for path in found if path and os.access(path, os.X_OK)), None)


def build(
    compiler: str, name: str, sources: Sequence[Path], headers: Sequence[Path] = (), defines: Sequence[str] = ()
) -> Path:
    """Return the path of the library in Triton's cache folder, compiled unless it is there. One process at a time compiles.

    Raises:
        RuntimeError: nvcc fails. The message contains the end of its output.
    """
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    texts = (path.read_text() for path in (*sources, *headers))
    options = [*OPTIONS, *(f"-D{define}" for define in defines)]
    key = hashlib.sha256("".join([version, *options, *texts]).encode()).hexdigest()
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache") / "hybrid_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}-{key[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile([compiler, *options, *map(str, sources)], library)
    return library


def _compile(command: list[str], library: Path) -> None:
    part = library.with_suffix(".part")
    ran = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(ran.stderr or ran.stdout)[-1000:].strip()}")
    part.rename(library)


def load(
    name: str, sources: Sequence[Path], headers: Sequence[Path] = (), defines: Sequence[str] = ()
) -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, or the reason why there is none. `defines`: macros, such as "N=64"."""
    compiler = find_nvcc()
    if compiler is None:
        return None, "nvcc was not found ($CUDA_HOME, PATH, /usr/local/cuda, pip's nvidia-cuda-nvcc)"
    try:
        return ctypes.CDLL(str(build(compiler, name, sources, headers, defines))), None
    except (RuntimeError, OSError) as error:
        return None, f"its kernels could not be built: {error}"
