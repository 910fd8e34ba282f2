"""The kernels of gated_delta_rule in CUDA C++ against those in Triton, in one process: errors first, then times.

All scans read the results of the same `prepare`. Errors are relative to fp64. Run on a Hopper GPU with nvcc.
"""

import subprocess
from dataclasses import replace

import torch
from kernel_timing import copy_tb_s, gpu_ms, write_gpu
from report import bounded, row

from hybrid_kernels.gated_delta_rule import gated_delta_rule
from hybrid_kernels.gated_delta_rule.backends.cuda import op as cuda_op
from hybrid_kernels.gated_delta_rule.backends.triton import op as triton_op
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks
from hybrid_kernels.gated_delta_rule.backends.triton.op import prepare
from hybrid_kernels.nvcc import find_nvcc
from hybrid_kernels.testing import delta_rule_inputs, relative_error

K, V = 96, 192
SHAPES = ((1, 8192, 30), (1, 8192, 15), (4, 8192, 30))
PARTS = {  # least bytes read and written per token and head: q, k, v (or do), A, P, G; then the results
    "prepare": 4 * K + 4 * 64 + 12,
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


def prepares(inputs) -> list:
    """Return functions in CUDA C++ and in Triton that compute A, P and G by name."""
    q, k, v, g, beta = inputs
    rest = (q, k, g, beta, K**-0.5, Chunks.of(v, None), False)
    return [lambda x=x: vars(x.prepare(*rest)) for x in (cuda_op, triton_op)]


def near(name, inputs) -> list[dict]:
    """Compare the results of `prepare` with Triton's, which have the same rounding, and with those of a second run."""
    rows, (mine, peer) = [], prepares(inputs)
    ours, again, theirs = mine(), mine(), peer()
    for what, most in dict(A=5e-4, P=4e-3, G=1e-5).items():
        error = relative_error(ours[what], theirs[what])
        rows.append(bounded(name, f"prepare: difference of {what} from Triton's", "relative RMS", error, most))
        same = bool(torch.equal(ours[what], again[what]))
        rows.append(dict(row(name, f"prepare: {what}'s bits, twice", "bool", same), goal=True, met=same))
    return rows


def random_inputs(batch, length, heads):
    """Draw inputs for an eighth of the length and repeat them, because drawing takes longer than the rest."""
    small = delta_rule_inputs(1, length // 8, heads, heads, K, V, dtype=torch.bfloat16, device="cuda")
    return [x.repeat(batch, 8, *[1] * (x.dim() - 2)) for x in small]


def times(name, inputs) -> list[dict]:
    rows, tokens = [], inputs[2].shape[:3].numel()
    for what, both in {"prepare": prepares(inputs), **scans(inputs)}.items():
        ours, peer = map(gpu_ms, both)
        rows.append(row(name, what, "ms", ours, peer, "Triton", 1.2))
        speed = tokens * PARTS[what] / ours / 1e9
        rows.append(row(name, f"{what}: bytes at least moved, a second", "TB/s", speed, copy_tb_s(), "a copy", None, True))
    leaves = [x.clone().requires_grad_() for x in inputs]

    def step(backend):
        o, _ = gated_delta_rule(*leaves, backend=backend)
        torch.autograd.grad(o, leaves, inputs[2])

    ours, peer = (gpu_ms(lambda backend=backend: step(backend)) for backend in ("cuda", "triton"))
    rows.append(row(name, "forward and backward", "ms", ours, peer, "Triton"))
    return rows


def main() -> None:
    rows, documents = [], torch.tensor([0, 1, 1, 64, 129, 700, 1000], device="cuda")
    small = dict(key_dim=K, value_dim=V, dtype=torch.bfloat16, device="cuda")
    grouped = delta_rule_inputs(2, 1000, 1, 2, **small)
    rows += agree(
        "B 2, T 1000, 1 key head, 2 value heads, initial state", grouped, torch.randn(2, 2, K, V, device="cuda")
    )
    rows += agree("documents", delta_rule_inputs(1, 1000, 1, 2, **small), None, documents)
    alike = delta_rule_inputs(1, 1000, 1, 2, **small, beta=1.99, cosine=0.9)
    rows += agree("beta 1.99, cosine 0.9", alike)
    rows += near("B 2, T 1000, 1 key head, 2 value heads", grouped) + near("beta 1.99, cosine 0.9", alike)
    for batch, length, heads in SHAPES:
        name, inputs = f"B {batch}, T {length}, H {heads}", random_inputs(batch, length, heads)
        rows += near(name, inputs) + agree(name, inputs)
        rows += times(name, inputs)
        write_gpu("hopper_trial", rows)
    compiler = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True).stdout
    print(compiler.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
