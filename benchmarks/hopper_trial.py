"""The kernels of gated_delta_rule in CUDA C++ against those in Triton, in one process: errors first, then times.

All scans read the results of the same `prepare`, and both `gradients` those of the same scans. Errors are relative to fp64. Run on a
Hopper GPU with nvcc. With --watchdog, a kernel that hangs is an error.
"""

import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import torch
from kernel_timing import copy_tb_s, gpu_ms, write_gpu
from report import bounded, row

from hybrid_kernels import nvcc
from hybrid_kernels.gated_delta_rule import gated_delta_rule
from hybrid_kernels.gated_delta_rule.backends.cuda import op as cuda_op
from hybrid_kernels.gated_delta_rule.backends.triton import op as triton_op
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks
from hybrid_kernels.gated_delta_rule.backends.triton.op import prepare
from hybrid_kernels.testing import delta_rule_inputs, relative_error

K, V = 96, 192
SHAPES = ((1, 8192, 30), (1, 8192, 15), (4, 8192, 30))
PARTS = {  # least bytes read and written per token and head: q, k, v (or do), A, P, G; then the results
    "prepare": 4 * K + 4 * 64 + 12,
    "gradients": 8 * K + 6 * V + 4 * V * K // 64 + 16,
    "forward scan": 4 * K + 2 * V + 4 * 64 + 4 + 2 * V,
    "forward scan for states": 2 * K + 2 * V + 2 * 64 + 4 + 2 * V * K // 64 + 2 * V,
    "forward scan for both": 4 * K + 2 * V + 4 * 64 + 4 + 2 * V * K // 64 + 4 * V,
    "reverse scan": 4 * K + 2 * V + 4 * 64 + 4 + 2 * V * K // 64 + 2 * V,
}


def given(*tensors) -> list:
    return [x for x in tensors if x is not None]


def scans(inputs, initial=None, cu_seqlens=None) -> dict[str, list]:
    """Return every scan over whole sequences, in CUDA C++ and in Triton, as functions of whether to return the last state."""
    q, k, v, g, beta = inputs
    chunks = Chunks.of(v, cu_seqlens)  # never in segments
    if cu_seqlens is not None:
        chunks = replace(chunks, count=int(chunks.first[-1]))  # no room for chunks that there are not
    scores, do = prepare(q, k, g, beta, K**-0.5, chunks, cu_seqlens is not None), v.roll(1, 1)
    rest = (initial, cu_seqlens, K**-0.5, chunks)

    def forward(module, **options):
        def run(last=False):
            o, end, kept = module.forward_scan(q, k, v, scores, *rest, final=last, **options)
            return given(o, end, *kept)

        return run

    def reverse(module):
        return lambda last=False: given(*module.reverse_scan(q, k, do, scores, *rest, initial=last))

    modules = (cuda_op, triton_op)
    return {
        "forward scan": [forward(x, output=True) for x in modules],
        "forward scan for states": [forward(x, states=True) for x in modules],
        "forward scan for both": [forward(x, output=True, states=True) for x in modules],
        "reverse scan": [reverse(x) for x in modules],
    }


def agree(name, inputs, initial=None, cu_seqlens=None) -> list[dict]:
    rows, both = [], scans(inputs, initial, cu_seqlens)
    for what, (scan, _) in both.items():
        same = all(torch.equal(x, y) for x, y in zip(scan(True), scan(True), strict=True))
        rows.append(dict(row(name, f"{what}: the same bits twice", "bool", same), goal=True, met=same))
    if inputs[0].shape[1] <= 1024:
        leaves = [x.double().requires_grad_() for x in inputs]
        start = None if initial is None else initial.double().requires_grad_()
        options = dict(initial_state=start, cu_seqlens=cu_seqlens, output_final_state=True)
        exact = gated_delta_rule(*leaves, **options, backend="torch")
        do = leaves[2].detach().roll(1, 1)
        dfinal = torch.zeros_like(exact[1]) if initial is None else initial.double()
        exact += torch.autograd.grad(exact, [leaves[2], *([] if start is None else [start])], [do, dfinal])
        found = (("o", "forward scan", 0), ("final state", "forward scan", 1), ("dv", "reverse scan", 0))
        found += (("the initial state's gradient", "reverse scan", 2),)
        for (what, scan, i), truth in zip(found, exact):
            errors = [relative_error(x(True)[i], truth) for x in both[scan]]
            rows.append(row(name, f"error of {what}", "relative RMS", *errors, "Triton", 0.9))
    return rows


def per_chunk(inputs, cu_seqlens=None) -> dict[str, list]:
    """Return the kernels that are parallel over chunks, in CUDA C++ and in Triton, as functions that return results by name."""
    q, k, v, g, beta = inputs
    varlen, do, chunks = cu_seqlens is not None, v.roll(1, 1), Chunks.of(v, cu_seqlens)
    scores = cuda_op.prepare(q, k, g, beta, K**-0.5, chunks, varlen)
    rest = (None, cu_seqlens, K**-0.5, chunks)
    states, new_values = cuda_op.forward_scan(q, k, v, scores, *rest, states=True)[2]
    dv, dstates, _ = cuda_op.reverse_scan(q, k, do, scores, *rest)
    given = (q, k, g, beta, do, dv, scores.G, states, new_values, dstates, K**-0.5, chunks, varlen)

    def prepares(module):
        return lambda: vars(module.prepare(q, k, g, beta, K**-0.5, chunks, varlen))

    def gradients(module):
        return lambda: dict(zip(("dq", "dk", "dg", "dbeta"), module.gradients(*given), strict=True))

    modules = (cuda_op, triton_op)
    return {"prepare": [prepares(x) for x in modules], "gradients": [gradients(x) for x in modules]}


def near(name, inputs, kernels=("prepare", "gradients"), cu_seqlens=None) -> list[dict]:
    """Compare the results of these kernels with Triton's, which have the same rounding, and with those of a second run."""
    rows, most = [], dict(A=5e-4, P=4e-3, G=1e-5, dq=4e-3, dk=4e-3, dg=1e-2, dbeta=1e-5)
    for kernel, (mine, peer) in per_chunk(inputs, cu_seqlens).items():
        if kernel not in kernels:
            continue
        ours, again, theirs = mine(), mine(), peer()
        for what, x in ours.items():
            metric, error = f"{kernel}: difference of {what} from Triton's", relative_error(x, theirs[what])
            rows.append(bounded(name, metric, "relative RMS", error, most[what]))
            same = bool(torch.equal(x, again[what]))
            rows.append(dict(row(name, f"{kernel}: {what}'s bits, twice", "bool", same), goal=True, met=same))
    return rows


def random_inputs(batch, length, heads):
    """Draw inputs for an eighth of the length and repeat them, because drawing takes longer than the rest."""
    small = delta_rule_inputs(1, length // 8, heads, heads, K, V, dtype=torch.bfloat16, device="cuda")
    return [x.repeat(batch, 8, *[1] * (x.dim() - 2)) for x in small]


def times(name, inputs) -> list[dict]:
    rows, tokens = [], inputs[2].shape[:3].numel()
    for what, both in {**per_chunk(inputs), **scans(inputs)}.items():
        ours, peer = map(gpu_ms, both)
        rows.append(row(name, what, "ms", ours, peer, "Triton", 1.2))
        speed = tokens * PARTS[what] / ours / 1e9
        rows.append(
            row(name, f"{what}: bytes at least moved, a second", "TB/s", speed, copy_tb_s(), "a copy", None, True)
        )
    leaves = [x.clone().requires_grad_() for x in inputs]

    def step(backend):
        o, _ = gated_delta_rule(*leaves, backend=backend)
        torch.autograd.grad(o, leaves, inputs[2])

    ours, peer = (gpu_ms(lambda backend=backend: step(backend)) for backend in ("cuda", "triton"))
    rows.append(row(name, "forward and backward", "ms", ours, peer, "Triton"))
    with patch.object(cuda_op, "gradients", triton_op.gradients):
        peer = gpu_ms(lambda: step("cuda"))
    rows.append(row(name, "forward and backward, gradients", "ms", ours, peer, "gradients in Triton"))
    return rows


def main() -> None:
    if "--watchdog" in sys.argv:
        nvcc.OPTIONS = (*nvcc.OPTIONS, "-DWATCHDOG")
    rows, documents = [], torch.tensor([0, 1, 1, 64, 129, 700, 1000], device="cuda")
    small = dict(key_dim=K, value_dim=V, dtype=torch.bfloat16, device="cuda")
    grouped = delta_rule_inputs(2, 1000, 1, 2, **small)
    rows += agree(
        "B 2, T 1000, 1 key head, 2 value heads, initial state", grouped, torch.randn(2, 2, K, V, device="cuda")
    )
    packed = delta_rule_inputs(1, 1000, 1, 2, **small)
    rows += agree("documents", packed, None, documents) + near("documents", packed, ["gradients"], documents)
    alike = delta_rule_inputs(1, 1000, 1, 2, **small, beta=1.99, cosine=0.9)
    rows += agree("beta 1.99, cosine 0.9", alike)
    rows += near("B 2, T 1000, 1 key head, 2 value heads", grouped) + near("beta 1.99, cosine 0.9", alike)
    for batch, length, heads in SHAPES:
        name, inputs = f"B {batch}, T {length}, H {heads}", random_inputs(batch, length, heads)
        rows += near(name, inputs) + agree(name, inputs)
        rows += times(name, inputs)
        write_gpu("hopper_trial", rows)
    compiler = subprocess.run([nvcc.find_nvcc(), "--version"], capture_output=True, text=True).stdout
    print(compiler.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
