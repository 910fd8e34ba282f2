"""Triton kernels fit an SM of a Hopper GPU, as compiled without a GPU. GEMMs of the delta rule overlap, and so do loads of norms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).resolve().parent / "compile_for_hopper.py"
SHARED, REGISTERS = 227 * 1024, 65536
"""Bytes of shared memory that a program may have, and registers of an SM."""


def compiled(root, *arguments):
    """Return what compile_for_hopper.py prints of each kernel."""
    path = os.pathsep.join([str(root / "kernels"), str(root)])
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    "key_dim, value_dim, segments, ranks, documents",
    [(96, 192, 3, 1, 0), (96, 64, 1, 1, 0), (256, 256, 1, 1, 0), (256, 256, 1, 2, 0), (96, 192, 3, 2, 1)],
)
def test_fits(key_dim, value_dim, segments, ranks, documents, root):
    kernels = compiled(root, key_dim, value_dim, segments, ranks, documents)
    assert {"prepare_kernel", "forward_scan_kernel", "reverse_scan_kernel", "gradients_kernel"} <= {
        kernel["kernel"] for kernel in kernels
    }
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert not kernel["warnings"], kernel  # C7517: the assembler waits for every GEMM
        if kernel["kernel"] == "gradients_kernel":  # Triton 3.6 miscompiles its GEMMs outside a pipelined loop
            assert kernel["pipelined"], kernel


@pytest.mark.parametrize("width, dtype, programs", [(3840, "bfloat16", 2), (256, "bfloat16", 2), (8192, "float32", 1)])
def test_norms_fit(width, dtype, programs, root):
    """At the model's width, two programs of the backward pass share an SM and load rows ahead."""
    kernels = compiled(root, "rmsnorm", width, dtype)
    assert [kernel["kernel"] for kernel in kernels] == ["forward_kernel", "backward_kernel", "sum_kernel"] * 2
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["pipelined"] == (kernel["kernel"] == "backward_kernel"), kernel
        allocated = -(-kernel["registers"] // 8) * 8 * 32 * kernel["warps"]
        assert allocated * programs <= REGISTERS and kernel["shared"] * programs <= SHARED, kernel
