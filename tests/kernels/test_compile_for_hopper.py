"""Every Triton kernel of the delta rule fits an SM of a Hopper GPU, and its GEMMs overlap, as compiled without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).resolve().parent / "compile_for_hopper.py"
SHARED = 227 * 1024
"""Bytes of shared memory available to a program."""


@pytest.mark.parametrize(
    "key_dim, value_dim, segments, ranks, documents",
    [(96, 192, 3, 1, 0), (96, 64, 1, 1, 0), (256, 256, 1, 1, 0), (256, 256, 1, 2, 0), (96, 192, 3, 2, 1)],
)
def test_fits(key_dim, value_dim, segments, ranks, documents, root):
    command = [sys.executable, str(SCRIPT), *map(str, (key_dim, value_dim, segments, ranks, documents))]
    path = os.pathsep.join([str(root / "kernels"), str(root)])
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    kernels = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert {"prepare_kernel", "forward_scan_kernel", "reverse_scan_kernel", "gradients_kernel"} <= {
        kernel["kernel"] for kernel in kernels
    }
    for kernel in kernels:
        assert kernel["shared"] <= SHARED, kernel
        assert not kernel["warnings"], kernel  # C7517: the assembler waits for every GEMM
        if kernel["kernel"] == "gradients_kernel":  # Triton 3.6 miscompiles its GEMMs outside a pipelined loop
            assert kernel["pipelined"], kernel
