"""The forward scan of gated_delta_rule in CUDA C++ against the one in Gluon, in one process: results first, then times.

Both get what one `prepare` wrote. The results have to be the same to the bit; fp64 says how far both are from the truth.
Run on a Hopper GPU with nvcc.
"""

import subprocess

import torch
from kernel_timing import gpu_ms, write_gpu
from report import row

from hybrid_kernels.gated_delta_rule import cuda_op, explain, gated_delta_rule, gluon_op
from hybrid_kernels.gated_delta_rule.triton_op import Chunks, prepare
from hybrid_kernels.testing import delta_rule_inputs, relative_error

K, V = 96, 192
SHAPES = ((1, 8192, 30), (1, 8192, 15), (4, 8192, 30))


def scans(q, k, v, g, beta, initial=None, cu_seqlens=None):
    """The two scans over whole sequences, as functions of the options they take."""
    chunks = Chunks.of(v, K, cu_seqlens)
    if cu_seqlens is None:
        chunks = Chunks(v.shape[0], v.shape[1], chunks.count, v, v, v)  # never in segments
    scores = prepare(q, k, g, beta, K**-0.5, chunks, cu_seqlens is not None)
    args = (q, k, v, scores, initial, cu_seqlens, K**-0.5, chunks)
    return [lambda module=x, **options: module.forward_scan(*args, output=True, **options) for x in (cuda_op, gluon_op)]


def agree(name, inputs, initial=None, cu_seqlens=None) -> list[dict]:
    ours, peer = (scan(final=True)[:2] for scan in scans(*inputs, initial, cu_seqlens))
    again = scans(*inputs, initial, cu_seqlens)[0](final=True)
    same = all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(ours, peer, again))
    rows = [dict(row(name, "the bits of Gluon's scan, twice", "bool", same), goal=True, met=same)]
    if inputs[0].shape[1] <= 1024:
        doubled = [x.double() for x in inputs]
        start = initial if initial is None else initial.double()
        exact = gated_delta_rule(
            *doubled, initial_state=start, cu_seqlens=cu_seqlens, output_final_state=True, backend="torch"
        )
        for what, x, y, z in zip(("o", "final state"), ours, peer, exact):
            errors = relative_error(x, z), relative_error(y, z)
            rows.append(row(name, f"error of {what}", "relative RMS", *errors, "Gluon", 0.999))
    return rows


def random_inputs(batch, length, heads):
    """Drawn for an eighth of the length and repeated: drawing them all takes longer than the rest."""
    small = delta_rule_inputs(1, length // 8, heads, heads, K, V, dtype=torch.bfloat16, device="cuda")
    return [x.repeat(batch, 8, *[1] * (x.dim() - 2)) for x in small]


def times(name, inputs) -> list[dict]:
    ours, peer = (gpu_ms(scan) for scan in scans(*inputs))
    rows = [row(name, "forward scan", "ms", ours, peer, "Gluon", 1.05)]
    batch, length, heads = inputs[2].shape[:3]
    size = batch * length * heads * (4 * (K + V) + 4 * 64 + 4)  # q, k, v, o; A and P; G
    rows.append(row(name, "bytes at least moved, a second", "TB/s", size / ours / 1e9, 3.0, "a copy", None, True))
    if "segments" not in str(explain(*inputs)):  # what the op does is this scan after prepare
        available = cuda_op.missing
        ours = gpu_ms(lambda: gated_delta_rule(*inputs, backend="hopper"))
        cuda_op.missing = lambda *_: "switched off to be compared with"
        peer = gpu_ms(lambda: gated_delta_rule(*inputs, backend="hopper"))
        cuda_op.missing = available
        rows.append(row(name, "forward", "ms", ours, peer, "with Gluon's scan"))
    return rows


def main() -> None:
    rows, documents = [], torch.tensor([0, 1, 1, 64, 129, 700, 1000], device="cuda")
    small = dict(key_dim=K, value_dim=V, dtype=torch.bfloat16, device="cuda")
    grouped = delta_rule_inputs(2, 1000, 1, 2, **small)
    rows += agree(
        "B 2, T 1000, 1 key head, 2 value heads, initial state", grouped, torch.randn(2, 2, K, V, device="cuda")
    )
    rows += agree("documents", delta_rule_inputs(1, 1000, 1, 2, **small), None, documents)
    rows += agree("beta 1.99, cosine 0.9", delta_rule_inputs(1, 1000, 1, 2, **small, beta=1.99, cosine=0.9))
    for batch, length, heads in SHAPES:
        name, inputs = f"B {batch}, T {length}, H {heads}", random_inputs(batch, length, heads)
        rows += agree(name, inputs)
        rows += times(name, inputs)
        write_gpu("hopper_trial", rows)
    compiler = subprocess.run([cuda_op.nvcc(), "--version"], capture_output=True, text=True).stdout
    print(compiler.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
