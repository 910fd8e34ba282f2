"""gated_delta_rule against fla's chunk_gated_delta_rule (its own kernels) in one process: errors first, then times.

Errors are relative RMS against fp64; both sides get the same bf16 inputs. Run on a Hopper GPU with
flash-linear-attention 0.6.0 and, for its backward, TileLang installed.
"""

import os

os.environ["FLA_FLASH_QLA"] = "0"  # the peer is fla's own kernels

import torch  # noqa: E402
from kernel_timing import cpu_ms, gpu_ms, kernels, write_gpu  # noqa: E402
from report import row  # noqa: E402

from hybrid_kernels.gated_delta_rule import gated_delta_rule  # noqa: E402
from hybrid_kernels.testing import delta_rule_inputs, relative_error  # noqa: E402

K, V = 96, 192
NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")
HARD = (
    ("beta U(0,2)", {}),
    ("beta 1.99", dict(beta=1.99)),
    ("cosine .5", dict(cosine=0.5)),
    ("cosine .9, gate 0", dict(cosine=0.9, gate=0.0)),
    ("cosine 1, beta 1.99, gate -1e-3", dict(cosine=1.0, beta=1.99, gate=-1e-3)),
    ("gate -50", dict(gate=-50.0)),
)
SHAPES = ((1, 8192, 30), (4, 8192, 30), "ragged", (1, 8192, 15), (1, 65536, 15), (1, 8192, 8))
SHORT = [0, 1, 1, 500, 1700, 1701, 4096]
RAGGED = [0, 1, 1, 500, 1700, 1701, 4096, 4160, 8192]


def results(inputs, backend, **options):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o, _ = gated_delta_rule(*leaves, backend=backend, **options)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (o, *torch.autograd.grad(o, leaves, do.to(o.device, o.dtype)))


def errors() -> list[dict]:
    rows = []
    cases = [(name, 1024, None, hard) for name, hard in HARD]
    cases += [(f"T {t}", t, None, {}) for t in (1, 63, 64, 65, 4096)] + [("ragged", 4096, SHORT, {})]
    for name, length, bounds, hard in cases:
        inputs = delta_rule_inputs(1, length, 30, 30, K, V, dtype=torch.bfloat16, device="cuda", **hard)
        cu = None if bounds is None else torch.tensor(bounds, device="cuda", dtype=torch.int32)
        exact = results([x.double() for x in inputs], "torch", cu_seqlens=cu)
        peer = results(inputs, "fla", cu_seqlens=cu)
        for backend in ("hopper", "triton"):
            ours = results(inputs, backend, cu_seqlens=cu)
            again = results(inputs, backend, cu_seqlens=cu)
            same = all(torch.equal(x, y) for x, y in zip(ours, again))
            rows.append(row(f"{name}, {backend}", "bitwise the same twice", "bool", same))
            for what, x, y, z in zip(NAMES, ours, peer, exact):
                # dg under strong decay is noise against what it is the difference of: a floor to what counts
                mine, theirs = relative_error(x, z, 1e-3), relative_error(y, z, 1e-3)
                rows.append(
                    row(f"{name}, {backend}", f"error of {what}", "relative RMS", mine, theirs, "fla 0.6", 1 / 1.2)
                )
    return rows


def measure(backend, inputs, do, cu, save="scores") -> dict:
    """Times, launches and memory of one implementation at one shape."""

    def forward():
        with torch.no_grad():
            gated_delta_rule(*inputs, cu_seqlens=cu, backend=backend, save=save)

    def both():
        o, _ = gated_delta_rule(*inputs, cu_seqlens=cu, backend=backend, save=save)
        torch.autograd.grad(o, inputs, do)

    out = {"forward": gpu_ms(forward), "forward + backward": gpu_ms(both), "cpu": cpu_ms(both)}
    launched = kernels(both)
    print(backend, {name: round(us) for name, (_, us) in launched.items() if us > 5}, flush=True)
    out["kernels"] = sum(count for count, _ in launched.values())
    start = torch.cuda.memory_allocated()
    o, _ = gated_delta_rule(*inputs, cu_seqlens=cu, backend=backend, save=save)
    out["saved"] = (torch.cuda.memory_allocated() - start - o.nbytes) / (inputs[0].shape[0] * inputs[0].shape[1])
    return out


def times(shapes) -> list[dict]:
    rows = []
    for shape in shapes:
        batch, length, heads = SHAPES[0] if shape == "ragged" else shape
        name = f"B {batch}, T {length}, H {heads}" + (", ragged" if shape == "ragged" else "")
        print(name, flush=True)
        cu = torch.tensor(RAGGED, device="cuda", dtype=torch.int32) if shape == "ragged" else None
        small = delta_rule_inputs(1, length // 8, heads, heads, K, V, dtype=torch.bfloat16, device="cuda")
        inputs = [x.repeat(batch, 8, *[1] * (x.dim() - 2)).requires_grad_() for x in small]
        do = torch.randn_like(inputs[2])
        peer = measure("fla", inputs, do, cu)
        for backend, save, goals in (
            ("hopper", "scores", (1.6, 1.6)), ("hopper", "states", (1.6, 1.6)), ("triton", "scores", (1.4, 1.6))
        ):  # fmt: skip
            ours = measure(backend, inputs, do, cu, save)
            case = f"{name}, {backend}, saving {save}"
            for metric, goal in zip(("forward", "forward + backward"), goals):
                rows.append(row(case, metric, "ms", ours[metric], peer[metric], "fla 0.6", goal))
            for metric, unit, key in (
                ("launch time, forward + backward", "ms", "cpu"),
                ("kernels, forward + backward", "launches", "kernels"),
                ("saved for the backward beside the inputs", "bytes a token", "saved"),
            ):
                rows.append(row(case, metric, unit, ours[key], peer[key], "fla 0.6"))
    return rows


if __name__ == "__main__":
    rows = times(SHAPES[:2])  # the result file grows as it goes: fla compiles for minutes at new head numbers
    write_gpu("gated_delta_rule", rows)
    rows += errors()
    write_gpu("gated_delta_rule", rows)
    for shape in SHAPES[2:]:
        rows += times([shape])
        write_gpu("gated_delta_rule", rows)
