"""CUDA kernels compiled by nvcc, for the report of its assembler, and by g++ for the CPU (cuda_on_cpu.h), to be called by ctypes."""

import ctypes
import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hybrid_kernels import nvcc

SHARED_BUILDS = "HYBRID_SHARED_BUILDS"


def assembler_says(folder: Path, source: Path, key_dim: int = 96) -> str:
    """Return the assembler's report on registers, spills, shared memory and warnings."""
    options = [x for x in nvcc.OPTIONS if x not in ("-shared", "-Xcompiler", "-fPIC")]
    command = [
        nvcc.find_nvcc(),
        *options,
        f"-DKEY_DIM={key_dim}",
        "-Xptxas",
        "-v",
        "-cubin",
        "-o",
        str(folder / source.stem),
        str(source),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "warning" not in ran.stderr, ran.stderr
    return ran.stderr


def shared_builds(temporary: pytest.TempPathFactory) -> Path:
    """Return the folder of libraries that the processes of a test run share.

    pytest-xdist's workers have folders in one folder. Tests that start pytest pass it on in HYBRID_SHARED_BUILDS.
    """
    folder = Path(os.environ.get(SHARED_BUILDS) or temporary.getbasetemp())
    if SHARED_BUILDS not in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "builds"
    folder.mkdir(exist_ok=True)
    return folder


def compiled(folder: Path, source: Path, entry: str, key_dim: int = 96) -> ctypes.CDLL:
    """Compile `source` and `entry`, C++ that calls its kernel, as a library for the CPU. Skips without g++.

    Args:
        folder: of `shared_builds`. Whichever process needs a library first compiles it, the others wait.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    headers = [Path(__file__).with_name(f"{name}.h") for name in ("cuda_on_cpu", "cuda_scans_on_cpu")]
    harness = folder / f"{source.stem}-{key_dim}.cpp"
    library = harness.with_suffix(".so")
    with open(harness.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            harness.write_text("\n".join([*(f'#include "{path}"' for path in (*headers, source)), entry]))
            unfinished = library.with_suffix(".unfinished")
            options = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", f"-DKEY_DIM={key_dim}", "-shared", "-fPIC"]
            ran = subprocess.run(["g++", *options, "-o", unfinished, harness], capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            unfinished.rename(library)
    return ctypes.CDLL(str(library))
