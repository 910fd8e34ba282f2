"""Compile the Triton launches of operations, forward and backward, for sm_90 without a GPU. Prints one JSON line per kernel.

    python tests/kernels/compile_for_hopper.py CASE ...

CASE: delta_rule,KEY_DIM,VALUE_DIM,SEGMENTS,RANKS,DOCUMENTS or rmsnorm,WIDTH,DTYPE or conv_gates,HEADS,KEY_DIM,VALUE_DIM,DOCUMENTS
RANKS: 2 for sequences in slices on several ranks. DOCUMENTS: 1 for documents in the sequences.

Each line has the case, and the shared memory, registers, spills and assembler warnings of a run on an H100. Nothing is launched.
"""

import io
import json
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hybrid_kernels.testing import delta_rule_inputs, packed_inputs

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


class Hopper:
    """Driver without a GPU, for Triton's compiler."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


class TwoRanks:
    """First of two ranks, without communication."""

    def size(self):
        return 2

    def rank(self):
        return 0


@cache
def assembler_says(ptx: str) -> str:
    """Return the assembler's report on a kernel that Triton had in its cache."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


RUN = JITFunction.run
REPORTS: dict[str, str] = {}
"""The assembler's reports on the kernels that this process has compiled, by their PTX."""


def compile_instead_of_launching(case: str) -> None:
    """Make every Triton launch of this process compile its kernel and print a JSON line."""
    driver.set_active(Hopper())
    knobs.nvidia.dump_ptxas_log = True

    def compile_only(self, *args, grid, warmup, **options):
        with redirect_stdout(io.StringIO()) as said:
            kernel = RUN(self, *args, grid=grid, warmup=True, **options)
        ptx = kernel.asm["ptx"]
        log = REPORTS.setdefault(ptx, said.getvalue()) or assembler_says(ptx)
        print(
            json.dumps(
                dict(
                    case=case,
                    kernel=self.__name__,
                    warps=kernel.metadata.num_warps,
                    shared=kernel.metadata.shared,
                    registers=int(re.search(r"Used (\d+) registers", log)[1]),
                    spilled=int(re.search(r"(\d+) bytes spill stores", log)[1]),
                    warnings=re.findall(r".*C75\d\d.*", log),
                    pipelined="cp.async" in kernel.asm["ptx"],
                )
            )
        )
        return kernel

    JITFunction.run = compile_only


def delta_rule(key_dim: int, value_dim: int, segments: int, ranks: int, documents: int) -> None:
    from hybrid_kernels.gated_delta_rule import passes
    from hybrid_kernels.gated_delta_rule.backends.triton import op as triton_op
    from megatron_hybrid.distributed import context_parallel, state_passing

    triton_op.segments_of = lambda *_: segments
    context_parallel.all_gather = lambda x, group: torch.stack((x, x))
    inputs = delta_rule_inputs(1, 256, 2, 2, key_dim, value_dim, dtype=torch.bfloat16)
    positions = torch.zeros(1, 256, dtype=torch.int32) if documents else None
    if ranks > 1:
        o, initial, kept = state_passing.forward_of_slice(inputs, positions, 0.1, "scores", "triton", TwoRanks())
        state_passing.backward_of_slice(inputs, positions, initial, kept, o, 0.1, "triton", TwoRanks())
        return
    call = passes.Call.of(inputs, None, positions, 0.1, "triton")
    o, _, kept = passes.finish_forward(call, *passes.start_forward(call), None, False, "scores")
    complete, firsts = passes.start_backward(call, kept, None, o)
    passes.finish_backward(call, complete, firsts, o, None, False)


def rmsnorm(width: int, dtype: str) -> None:
    from hybrid_kernels.rmsnorm.backends.triton import op

    x = torch.empty(64, width, dtype=getattr(torch, dtype))
    weight, rstd = x[0].clone(), torch.empty(64)
    for residual in (None, x):
        op._forward(x, residual, weight, 1e-6, False)
        op._backward(x, weight, rstd, x, residual, False)


def conv_gates(heads: int, key_dim: int, value_dim: int, documents: int) -> None:
    from hybrid_kernels.conv_gates.backends.triton.op import conv_gates_triton

    inputs = packed_inputs(64, 1, heads, heads, key_dim, value_dim, padding=4, dtype=torch.bfloat16)
    positions = torch.zeros(1, 64, dtype=torch.int32) if documents else None
    dims = [heads, heads, key_dim, value_dim, heads * value_dim, 1]
    results = conv_gates_triton(*(x.requires_grad_() for x in inputs), positions, None, dims, 2.0, True)
    torch.autograd.grad(results, inputs, [torch.empty_like(x) for x in results])


if __name__ == "__main__":
    for case in sys.argv[1:]:
        operation, *numbers = case.split(",")
        compile_instead_of_launching(case)
        if operation == "rmsnorm":
            rmsnorm(int(numbers[0]), numbers[1])
        elif operation == "conv_gates":
            conv_gates(*map(int, numbers))
        else:
            delta_rule(*map(int, numbers))
