"""CUDA kernels compiled by nvcc, for the report of its assembler, and by g++ for the CPU (cuda_on_cpu.h), to be called by ctypes."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from hybrid_kernels import nvcc


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


def compiled(folder: Path, source: Path, entry: str, key_dim: int = 96) -> ctypes.CDLL:
    """Compile `source` and `entry`, C++ that calls its kernel, as a library for the CPU. Skips without g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    headers = [Path(__file__).with_name(f"{name}.h") for name in ("cuda_on_cpu", "cuda_scans_on_cpu")]
    harness = folder / "harness.cpp"
    harness.write_text("\n".join([*(f'#include "{path}"' for path in (*headers, source)), entry]))
    command = [
        "g++",
        "-std=c++20",
        "-O2",
        f"-DKEY_DIM={key_dim}",
        "-shared",
        "-fPIC",
        "-o",
        str(folder / "harness.so"),
        str(harness),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ctypes.CDLL(str(folder / "harness.so"))
