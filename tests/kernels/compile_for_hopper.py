"""Compile the launches of one delta rule, forward and backward, for sm_90 on a machine without a GPU; a JSON line a kernel.

    python tests/kernels/compile_for_hopper.py {triton,hopper} KEY_DIM VALUE_DIM SEGMENTS [RANKS]

RANKS: 2 for what runs where sequences are in slices on several.

Shared memory, registers, spills and warnings of the assembler, as a run on an H100 would meet them; nothing is launched.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hybrid_kernels.testing import MirrorGroup, delta_rule_inputs

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


class Hopper:
    """What Triton's compiler asks of a driver."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def assembler_says(ptx: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main(backend: str, key_dim: int, value_dim: int, segments: int, ranks: int = 1) -> None:
    driver.set_active(Hopper())
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        log = assembler_says(kernel.asm["ptx"])
        print(
            json.dumps(
                dict(
                    kernel=self.__name__,
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
    from hybrid_kernels import slices
    from hybrid_kernels.gated_delta_rule import autograd, cuda_op, triton_op

    triton_op.segments_of = lambda *_: segments
    cuda_op.missing = lambda *_: "what is compiled here is Triton's and Gluon's"
    inputs = delta_rule_inputs(1, 256, 2, 2, key_dim, value_dim, dtype=torch.bfloat16)
    slices.gather = lambda x, group: torch.stack((x, x))
    group = MirrorGroup() if ranks > 1 else None
    options = (0.1, False, "scores", backend == "hopper")
    o, _, saved = autograd.forward(*inputs, None, None, *options, group=group)
    autograd.backward(*inputs, None, None, saved, o, None, 0.1, backend == "hopper", group=group)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
