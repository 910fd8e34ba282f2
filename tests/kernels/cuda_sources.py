"""CUDA kernels compiled by nvcc, for what its assembler says, and for the CPU (cuda_on_cpu.h), to be called by ctypes."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from hybrid_kernels.gated_delta_rule import cuda_op


def assembler_says(folder: Path, source: Path) -> str:
    """Of registers, spills and shared memory, and warnings if any."""
    options = [x for x in cuda_op.OPTIONS if x not in ("-shared", "-Xcompiler", "-fPIC")]
    command = [cuda_op.nvcc(), *options, "-Xptxas", "-v", "-cubin", "-o", str(folder / source.stem), str(source)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "warning" not in ran.stderr, ran.stderr
    return ran.stderr


def compiled(folder: Path, source: Path, entry: str) -> ctypes.CDLL:
    """The kernel in `source` with `entry`, C++ that calls it, as a library; skips where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    header, harness = Path(__file__).with_name("cuda_on_cpu.h"), folder / "harness.cpp"
    harness.write_text(f'#include "{header}"\n#include "{source}"\n{entry}')
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-o", str(folder / "harness.so"), str(harness)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ctypes.CDLL(str(folder / "harness.so"))
