"""gated_delta_rule against fla's chunk_gated_delta_rule (its own kernels) in one process: errors first, then times.

Errors are relative RMS against fp64; both sides get the same bf16 inputs. Run on a Hopper GPU with
flash-linear-attention 0.6.0 and, for its backward, TileLang installed.

    --only REGEX    the parts whose name it finds: a shape ("H 15", "ragged"), "first use", "errors" or one of its cases
                    ("errors T 1$")
    --flashqla      also FlashQLA at 128/128, which compiles for minutes; its times are scaled by the work
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time

os.environ["FLA_FLASH_QLA"] = "0"  # the peer is fla's own kernels

import torch  # noqa: E402
from kernel_timing import copy_tb_s, cpu_ms, gpu_ms, kernels, write_gpu  # noqa: E402
from report import bounded, row  # noqa: E402

from hybrid_kernels.gated_delta_rule import explain, gated_delta_rule  # noqa: E402
from hybrid_kernels.testing import HARD_CASES, delta_rule_inputs, relative_error  # noqa: E402

K, V = 96, 192
NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta", "dinitial", "final")
SHAPES = ((1, 8192, 30), (4, 8192, 30), (1, 8192, 15), (1, 65536, 15), (1, 8192, 8))
SHORT = [0, 1, 1, 500, 1700, 1701, 4096]
RAGGED = [0, 1, 1, 500, 1700, 1701, 4096, 4160, 8192]


def results(inputs, backend, initial=None, **options):
    """o, the gradients of `inputs`, and those of the initial state and the final state if there is one."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *([] if initial is None else [initial]))]
    q, k, *rest = leaves[:5]
    if (
        backend == "fla" and q.shape[2] != rest[0].shape[2]
    ):  # its TileLang kernels take as many key heads as value heads
        q, k = (x.repeat_interleave(rest[0].shape[2] // x.shape[2], 2) for x in (q, k))
    o, final = gated_delta_rule(
        q, k, *rest, backend=backend, initial_state=None if initial is None else leaves[5],
        output_final_state=initial is not None, **options
    )  # fmt: skip
    out = [o] if final is None else [o, final]
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) for x in out]
    return (o, *torch.autograd.grad(out, leaves, given), *out[1:])


def errors(only: str) -> list[dict]:
    """Run every case on both backends: do two runs agree, and which error is worst relative to fla's on the same data?"""
    rows, heads = [], dict(key_heads=30, heads=30)
    cases = [(name, dict(length=1024, **heads, **hard), {}) for name, hard in HARD_CASES.items()]
    # of one token 64 batch rows: fewer gradients of beta would be too few to compare errors by
    cases += [(f"T {t}", dict(length=t, batch=64 if t == 1 else 1, **heads), {}) for t in (1, 63, 64, 65, 8192)]
    cases += [("ragged", dict(length=4096, **heads), dict(cu_seqlens=torch.tensor(SHORT).int().cuda()))]
    cases += [("10 key heads, 30 value heads", dict(length=1024, key_heads=10, heads=30), {})]
    cases += [("initial and final state", dict(length=1024, **heads), dict(initial=torch.randn(1, 30, K, V).cuda()))]
    for name, shape, options in cases:
        if not re.search(only, f"errors {name}"):
            continue
        shape = dict(batch=1, key_dim=K, value_dim=V) | shape
        inputs = delta_rule_inputs(**shape, dtype=torch.bfloat16, device="cuda")
        doubled = {k: x.double() if x.is_floating_point() else x for k, x in options.items()}
        exact = results([x.double() for x in inputs], "torch", **doubled)
        peer = results(inputs, "fla", **options)
        for backend in ("cuda", "triton"):
            ours = results(inputs, backend, **options)
            same = all(torch.equal(x, y) for x, y in zip(ours, results(inputs, backend, **options)))
            rows.append(dict(row(f"{name}, {backend}", "bitwise the same twice", "bool", same), goal=True, met=same))
            compared = []
            for what, x, y, z in zip(NAMES, ours, peer, exact):
                # dg under strong decay is noise against what it is the difference of: a floor to what counts
                mine, theirs = relative_error(x, z, 1e-3), relative_error(y, z, 1e-3)
                finite = bool(torch.isfinite(x).all())
                compared.append(
                    (mine / theirs if finite and theirs else float(mine > 0 or not finite), what, mine, theirs)
                )
            print(name, backend, *(f"{what} {mine:.2e}/{theirs:.2e}" for _, what, mine, theirs in compared), flush=True)
            _, what, mine, theirs = max(compared)
            metric = f"error of {what}, the worst relative to fla's"
            rows.append(row(f"{name}, {backend}", metric, "relative RMS", mine, theirs, "fla 0.6", round(1 / 1.2, 3)))
    return rows


def measure(rule, inputs, do) -> dict:
    """Times, launches and memory of `rule` (inputs -> o) on one shape."""

    def forward():
        with torch.no_grad():
            rule()

    def both():
        torch.autograd.grad(rule(), inputs, do)

    out = {"forward": gpu_ms(forward), "forward + backward": gpu_ms(both), "cpu": cpu_ms(both)}
    launched = kernels(both)
    print({name: round(us) for name, (_, us) in launched.items() if us > 5}, flush=True)
    out["kernels"] = sum(count for count, _ in launched.values())
    out["sum"] = sum(us for _, us in launched.values()) / 1e3
    start = torch.cuda.memory_allocated()
    o = rule()
    out["saved"] = (torch.cuda.memory_allocated() - start - o.nbytes) / (inputs[0].shape[0] * inputs[0].shape[1])
    return out


def random_inputs(batch, length, heads, key_dim, value_dim):
    """Drawn for an eighth of the length and repeated: drawing them all takes longer than the rest."""
    small = delta_rule_inputs(
        1, length // 8, heads, heads, key_dim, value_dim, dtype=torch.bfloat16, device="cuda"
    )  # fmt: skip
    return [x.repeat(batch, 8, *[1] * (x.dim() - 2)).requires_grad_() for x in small]


def times(name, batch, length, heads, bounds=None) -> list[dict]:
    rows = []
    cu = None if bounds is None else torch.tensor(bounds, device="cuda", dtype=torch.int32)
    inputs = random_inputs(batch, length, heads, K, V)
    do = torch.randn_like(inputs[2])

    def rule(backend, save="scores"):
        return lambda: gated_delta_rule(*inputs, cu_seqlens=cu, backend=backend, save=save)[0]

    peer = measure(rule("fla"), inputs, do)
    for backend, save, goals in (
        ("cuda", "scores", (1.6, 1.6)), ("cuda", "states", (1.6, 1.6)), ("triton", "scores", (1.4, 1.6))
    ):  # fmt: skip
        print(explain(*inputs, backend=backend, cu_seqlens=cu), flush=True)
        ours = measure(rule(backend, save), inputs, do)
        case = f"{name}, {backend}, saving {save}"
        for metric, goal in zip(("forward", "forward + backward"), goals):
            rows.append(row(case, metric, "ms", ours[metric], peer[metric], "fla 0.6", goal))
        for metric, unit, key in (
            ("forward + backward, sum of the kernels", "ms", "sum"),
            ("launch time, forward + backward", "ms", "cpu"),
            ("kernels, forward + backward", "launches", "kernels"),
            ("saved for the backward pass besides the inputs", "bytes a token", "saved"),
        ):
            rows.append(row(case, metric, unit, ours[key], peer[key], "fla 0.6"))
        # every input read once and every result written once, each way
        tokens, forward, backward = batch * length * heads, 4 * (K + V) + 8, 2 * (4 * K + 3 * V) + 16
        for metric, size in (("forward", forward), ("forward + backward", forward + backward)):
            rate = tokens * size / ours[metric] / 1e9
            rows.append(row(case, f"{metric}: bytes at least moved, a second", "TB/s", rate, copy_tb_s(), "a copy", None, True))
    return rows


def first_use(_) -> list[dict]:
    """Seconds that a process's first forward and backward take where nothing has been compiled yet."""
    rows = []
    for backend in ("cuda", "triton"):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--first", backend]
            environment = os.environ | {"TRITON_CACHE_DIR": cache}
            seconds = float(subprocess.check_output(command, env=environment, text=True))
        metric = "first forward + backward, compiling included"
        rows.append(bounded(f"B 1, T 8192, H 15, {backend}, nothing cached", metric, "s", seconds, 60))
    return rows


def first_seconds(backend: str) -> float:
    inputs = random_inputs(*SHAPES[2], K, V)
    torch.cuda.synchronize()
    start = time.perf_counter()
    o = gated_delta_rule(*inputs, backend=backend)[0]
    torch.autograd.grad(o, inputs, o)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def flashqla(name, batch, length, heads) -> list[dict]:
    """FlashQLA takes heads of 128/128 alone: what its design would give here is its time by the ratio of the work."""
    import flash_qla

    def best(width_k, width_v, rule):
        inputs = random_inputs(batch, length, heads, width_k, width_v)
        return measure(lambda: rule(*inputs), inputs, torch.randn_like(inputs[2]))

    ours = best(K, V, lambda *x: gated_delta_rule(*x, backend="cuda")[0])
    peer = best(128, 128, lambda q, k, v, g, beta: flash_qla.chunk_gated_delta_rule(q=q, k=k, v=v, g=g, beta=beta)[0])
    work = K * V / 128**2
    return [
        row(f"{name}, cuda, saving scores", m, "ms", ours[m], work * peer[m], f"FlashQLA at 128/128, times {work}")
        for m in ("forward", "forward + backward")
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--flashqla", action="store_true")
    parser.add_argument("--first", help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args()
    if options.first:
        print(first_seconds(options.first))
        sys.exit()
    parts = {f"B {b}, T {t}, H {h}": (times, b, t, h) for b, t, h in SHAPES}
    parts["B 1, T 8192, H 30, ragged"] = (times, *SHAPES[0], RAGGED)
    parts["first use"] = (first_use,)
    if options.flashqla:
        parts |= {f"B {b}, T {t}, H {h}, FlashQLA": (flashqla, b, t, h) for b, t, h in SHAPES[:2]}
    rows = []
    for name, (part, *shape) in parts.items():
        if re.search(options.only, name):
            print(name, flush=True)
            rows += part(name, *shape)
            write_gpu("gated_delta_rule", rows)  # the result file grows as it goes
    rows += errors(options.only)
    write_gpu("gated_delta_rule", rows)
