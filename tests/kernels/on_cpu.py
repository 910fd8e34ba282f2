"""CUDA kernels compiled for the CPU (cuda_on_cpu.h), to be called by ctypes."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest


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
