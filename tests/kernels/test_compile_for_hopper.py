"""Triton kernels fit an SM of a Hopper GPU, as compiled without a GPU. GEMMs of the delta rule overlap, and so do loads of norms.

Enough programs of the convolutions share an SM.
"""

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


DELTA_RULES = [
    f"delta_rule,{case}" for case in ("96,192,3,1,0", "96,64,1,1,0", "256,256,1,1,0", "256,256,1,2,0", "96,192,3,2,1")
]
"""Key and value dimensions, segments, ranks, and whether there are documents."""
NORMS = {"rmsnorm,3840,bfloat16": 2, "rmsnorm,256,bfloat16": 2, "rmsnorm,8192,float32": 1}
"""Programs of the backward pass that share an SM, by width and dtype."""
CONVOLUTIONS = {"conv_gates,30,96,192,0": (6, 3), "conv_gates,30,96,192,1": (5, 3)}
"""Programs of the forward and of the backward pass that share an SM, by heads, head dimensions and documents."""


@pytest.fixture(scope="module")
def kernels(root):
    """Compile all cases in one process, because importing torch takes seconds. Return what the script prints of each kernel."""
    path = os.pathsep.join([str(root / "kernels"), str(root)])
    command = [sys.executable, str(SCRIPT), *DELTA_RULES, *NORMS, *CONVOLUTIONS]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("case", DELTA_RULES)
def test_delta_rules_fit(case, kernels):
    found = [kernel for kernel in kernels if kernel["case"] == case]
    assert {"prepare_kernel", "forward_scan_kernel", "reverse_scan_kernel", "gradients_kernel"} <= {
        kernel["kernel"] for kernel in found
    }
    for kernel in found:
        assert kernel["shared"] <= SHARED, kernel
        assert not kernel["warnings"], kernel  # C7517: the assembler waits for every GEMM
        if kernel["kernel"] == "gradients_kernel":  # Triton 3.6 miscompiles its GEMMs outside a pipelined loop
            assert kernel["pipelined"], kernel


@pytest.mark.parametrize("case", NORMS)
def test_norms_fit(case, kernels):
    """Programs of the backward pass share an SM where rows are of the model's width, and load rows ahead."""
    found = [kernel for kernel in kernels if kernel["case"] == case]
    names = [f"rmsnorm_{name}_kernel" for name in ("forward", "backward", "sum")]
    assert [kernel["kernel"] for kernel in found] == names * 2
    for kernel in found:
        assert kernel["spilled"] == 0, kernel
        assert kernel["pipelined"] == (kernel["kernel"] == "rmsnorm_backward_kernel"), kernel
        assert programs_per_sm(kernel) >= NORMS[case], kernel


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_fit(case, kernels):
    """Enough programs share an SM to have a copy's bytes on their way. A program has four rows of each tensor on their way."""
    found = [kernel for kernel in kernels if kernel["case"] == case]
    names = [f"conv_gates_{name}kernel" for name in ("", "backward_", "sum_")]
    assert [kernel["kernel"] for kernel in found] == names
    for kernel, programs in zip(found, CONVOLUTIONS[case]):
        assert programs_per_sm(kernel) >= programs, kernel
    assert not any(kernel["spilled"] for kernel in found), found


def programs_per_sm(kernel):
    allocated = -(-kernel["registers"] // 8) * 8 * 32 * kernel["warps"]
    return min(REGISTERS // allocated, SHARED // kernel["shared"])
