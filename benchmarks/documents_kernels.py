"""Kernels on rows of documents against the same rows without boundaries, and against fla's varlen kernels, on one Hopper GPU.

Documents have log-normal lengths like AI2's corpora: median 400 tokens, about nine in 8,192 tokens. Errors against fp64 and
leaks across boundaries come first, on 2,048 tokens. Then launches and host synchronizations with 1, 16 and 512 documents, then
times. fla comes last, because its kernels are tuned for a minute. All together takes about three minutes.

    python benchmarks/documents_kernels.py [--only REGEX]
"""

import argparse
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

os.environ["FLA_FLASH_QLA"] = "0"  # the baseline is fla's own kernels

import torch  # noqa: E402
from gdn_glue import DIMS, PADDING, H, K, V, fla_conv_gates  # noqa: E402
from kernel_timing import gpu_ms, kernels, write_gpu  # noqa: E402
from report import bounded, row  # noqa: E402

from hybrid_kernels.conv_gates import conv_gates  # noqa: E402
from hybrid_kernels.documents import positions_from_cu_seqlens  # noqa: E402
from hybrid_kernels.gated_delta_rule import explain, gated_delta_rule  # noqa: E402
from hybrid_kernels.qk_norm_rope import qk_norm_rope  # noqa: E402
from hybrid_kernels.testing import (  # noqa: E402
    angles_of_sequences,
    delta_rule_inputs,
    packed_inputs,
    qkv_inputs,
    relative_error,
)

BF16 = dict(dtype=torch.bfloat16, device="cuda")
MEDIAN, SIGMA = 400, 1.27
DRAWN = 1024
"""Tokens that are drawn. They are repeated, because drawing all would take longer than the rest."""
SLOWDOWN = 1.1
"""Most time that documents may take, relative to the same tokens without boundaries."""
Op = Callable[..., tuple[torch.Tensor, ...]]


def bounds_of(length: int, seed: int = 0) -> list[int]:
    """Draw the bounds of documents that fill a row of `length` tokens."""
    generator, bounds = torch.Generator().manual_seed(seed), [0]
    while bounds[-1] < length:
        drawn = math.exp(math.log(MEDIAN) + SIGMA * float(torch.randn((), generator=generator)))
        bounds.append(min(length, bounds[-1] + max(1, round(drawn))))
    return bounds


def equal_bounds(length: int, count: int) -> list[int]:
    return [length * i // count for i in range(count + 1)]


def cu_of(bounds: list[int]) -> torch.Tensor:
    return torch.tensor(bounds, device="cuda", dtype=torch.int32)


def positions_of(bounds: list[int]) -> torch.Tensor:
    return positions_from_cu_seqlens(cu_of(bounds), bounds[-1])


class TwoRanks:
    """Second of two ranks. The first is a mirror, so that nothing is communicated."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


def of_slices(*inputs: torch.Tensor, positions_bs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Run the delta rule on the second of two slices, whose first document began in the first slice."""
    from megatron_hybrid.distributed import context_parallel
    from megatron_hybrid.distributed.state_passing import gated_delta_rule_of_slices

    if positions_bs is not None:
        of_first = positions_bs == torch.arange(positions_bs.shape[1], device=positions_bs.device)
        positions_bs = positions_bs + 1000 * of_first.int()
    context_parallel.all_gather = lambda x, group: torch.stack((x, x))
    return (gated_delta_rule_of_slices(*inputs, group=TwoRanks(), positions_bs=positions_bs),)


@dataclass(frozen=True)
class Kernel:
    """An op, its inputs with gradients, and how it takes documents."""

    inputs: list[torch.Tensor]
    run: Callable[[torch.Tensor | None], Op]
    """From positions, or None, to a function of the inputs."""
    peer: Callable[[torch.Tensor], Op] | None = None
    """From cu_seqlens to fla's function of the same inputs."""

    def both(self, op: Op, inputs: list[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Return results and gradients."""
        inputs = self.inputs if inputs is None else inputs
        results = op(*inputs)
        return [*results, *torch.autograd.grad(results, inputs, [torch.ones_like(x) for x in results])]

    def forward(self, op: Op) -> None:
        with torch.no_grad():
            op(*self.inputs)


def delta_rule(length: int, heads: int, sliced: bool = False, backend: str | None = None) -> Kernel:
    drawn = delta_rule_inputs(1, DRAWN, heads, heads, K, V, **BF16)
    inputs = [x.repeat(1, length // DRAWN, *[1] * (x.dim() - 2)).requires_grad_() for x in drawn]
    if sliced:
        return Kernel(inputs, lambda positions: lambda *x: of_slices(*x, positions_bs=positions))
    return Kernel(
        inputs,
        lambda positions: lambda *x: gated_delta_rule(*x, positions_bs=positions, backend=backend)[:1],
        lambda cu: lambda *x: gated_delta_rule(*x, cu_seqlens=cu, backend="fla")[:1],
    )


def conv(length: int, backend: str | None = None) -> Kernel:
    packed, *weights = packed_inputs(DRAWN, 1, H, H, K, V, padding=PADDING, **BF16)
    inputs = [x.requires_grad_() for x in (packed.repeat(length // DRAWN, 1, 1), *weights)]
    options = dict(**DIMS, return_gate=True, backend=backend)
    return Kernel(
        inputs,
        lambda positions: lambda *x: conv_gates(*x, positions_bs=positions, **options),
        lambda cu: lambda *x: fla_conv_gates(*x, cu_seqlens=cu.long()),
    )


def qk(length: int, backend: str | None = None) -> Kernel:
    heads, dim = 30, 128
    *inputs, angles = qkv_inputs(length, 1, heads, heads, dim, **BF16)
    options = dict(head_dim=dim, true_widths=(heads * dim,) * 2, eps=1e-6, backend=backend)

    def run(positions: torch.Tensor | None) -> Op:
        own = angles if positions is None else angles_of_sequences(angles, positions)
        return lambda *x: qk_norm_rope(*x, own, **options)

    return Kernel([x.requires_grad_() for x in inputs], run)


# ---- errors


def errors(_: str) -> list[dict]:
    """Compare with fp64, and show that what is behind a boundary changes nothing before it, and the reverse."""
    rows, length = [], 2048
    bounds = [0, 1, 2, 66, 700, 1024, 1500, 2048]
    positions = positions_of(bounds)
    cases = {
        f"delta rule, {backend}": (delta_rule(length, 4, backend=backend), delta_rule(length, 4, backend="torch"), 2e-2)
        for backend in ("cuda", "triton")
    }
    cases["conv_gates"] = (conv(length), conv(length, "torch"), 5e-3)
    cases["qk_norm_rope"] = (qk(length), qk(length, "torch"), 5e-3)
    for name, (ours, exact, tolerance) in cases.items():
        doubles = [x.detach().double().requires_grad_() for x in ours.inputs]
        truth = exact.both(exact.run(positions), doubles)
        found, again = (ours.both(ours.run(positions)) for _ in range(2))
        worst = max(relative_error(x, y, floor=1e-2) for x, y in zip(found, truth, strict=True))
        rows.append(bounded(name, "largest error of results and gradients", "relative RMS", worst, tolerance))
        same = sum(not torch.equal(x, y) for x, y in zip(found, again, strict=True))
        rows.append(bounded(name, "results that differ from one run to the next", "", same, 0))
    for backend in ("cuda", "triton"):
        rows.append(bounded(f"delta rule, {backend}", "largest leak", "relative RMS", leak(length, backend), 5e-4))
    return rows


def leak(length: int, backend: str) -> float:
    """Return how much results and gradients on one side of a boundary change when everything on the other side does."""
    kernel, middle = delta_rule(length, 4, backend=backend), 700
    op = kernel.run(positions_of([0, middle, length]))
    before, worst = kernel.both(op), 0.0
    for same, changed in ((slice(0, middle), slice(middle, None)), (slice(middle, None), slice(0, middle))):
        others = [x.detach().clone() for x in kernel.inputs]
        for x in others:
            x[:, changed] = x[:, changed].roll(1, 1)
        after = kernel.both(op, [x.requires_grad_() for x in others])
        worst = max([worst, *(relative_error(x[:, same], y[:, same]) for x, y in zip(after, before, strict=True))])
    return worst


# ---- launches


def launches(_: str) -> list[dict]:
    """Count launches, and run without host synchronization, with 1, 16 and 512 documents."""
    rows, length = [], 8192
    cases = {
        "delta rule, 30 heads": delta_rule(length, 30),
        "delta rule, 8 heads": delta_rule(length, 8),
        "slice of the delta rule, 30 heads": delta_rule(length, 30, sliced=True),
        "conv_gates": conv(length),
        "qk_norm_rope": qk(length),
    }
    for name, kernel in cases.items():
        counts = {}
        for documents in (1, 16, 512):
            op = kernel.run(positions_of(equal_bounds(length, documents)))
            counts[documents] = sum(count for count, _ in kernels(partial(kernel.both, op)).values())
            torch.cuda.set_sync_debug_mode("error")
            kernel.both(op)
            torch.cuda.set_sync_debug_mode("default")
        print(name, counts, flush=True)
        rows.append(bounded(name, "launches with 512 documents", "", counts[512], counts[1]))
        rows.append(bounded(name, "launches with 16 documents", "", counts[16], counts[1]))
    return rows


# ---- times


def peak_gib(fn: Callable[[], object]) -> float:
    torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(kernel: Kernel, op: Op) -> dict[tuple[str, str], float]:
    return {
        ("forward", "ms"): gpu_ms(lambda: kernel.forward(op)),
        ("forward + backward", "ms"): gpu_ms(lambda: kernel.both(op)),
        ("peak memory, results included", "GiB"): peak_gib(lambda: kernel.both(op)),
    }


def times(name: str, kernel_of: Callable[[], Kernel], length: int) -> list[dict]:
    """Time with documents and without, in turn."""
    kernel, bounds = kernel_of(), bounds_of(length)
    with_documents, without = kernel.run(positions_of(bounds)), kernel.run(None)
    rounds = [[measure(kernel, op) for op in (with_documents, without)] for _ in range(2)]
    rows = []
    for metric, unit in rounds[0][0]:
        ours, whole = (min(one[i][metric, unit] for one in rounds) for i in range(2))
        case = f"{name}, {len(bounds) - 1} documents"
        rows.append(row(case, metric, unit, ours, whole, "ours without boundaries", round(1 / SLOWDOWN, 3)))
    return rows


def against_fla(name: str, kernel_of: Callable[[], Kernel], length: int) -> list[dict]:
    """Time next to fla's varlen kernels. A pass that fla cannot run here is reported, not hidden."""
    kernel, bounds = kernel_of(), bounds_of(length)
    assert kernel.peer is not None
    ours, peer = kernel.run(positions_of(bounds)), kernel.peer(cu_of(bounds))
    rows = []
    for metric, run in (("forward", kernel.forward), ("forward + backward", kernel.both)):
        try:
            theirs = gpu_ms(lambda run=run: run(peer))
        except Exception as error:
            print(name, metric, "fla cannot run:", repr(error)[:300], flush=True)
            continue
        mine, case = gpu_ms(lambda run=run: run(ours)), f"{name}, {len(bounds) - 1} documents"
        rows.append(row(case, metric, "ms", mine, theirs, "fla, varlen"))
    return rows


def parts() -> dict[str, tuple]:
    found: dict[str, tuple] = {"errors": (errors,), "launches": (launches,)}
    for length in (8192, 65536):
        found[f"conv_gates, {length} tokens"] = (times, lambda n=length: conv(n), length)
        found[f"qk_norm_rope, {length} tokens"] = (times, lambda n=length: qk(n), length)
        for heads in (30, 15, 8):
            case = f"{length} tokens, {heads} heads"
            found[f"delta rule, {case}"] = (times, lambda n=length, h=heads: delta_rule(n, h), length)
            found[f"slice of the delta rule, {case}"] = (
                times,
                lambda n=length, h=heads: delta_rule(n, h, sliced=True),
                length,
            )
    for length in (8192, 65536):
        found[f"fla: delta rule, {length} tokens, 30 heads"] = (against_fla, lambda n=length: delta_rule(n, 30), length)
        found[f"fla: conv_gates, {length} tokens"] = (against_fla, lambda n=length: conv(n), length)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    options, _ = parser.parse_known_args()
    print(explain(*delta_rule(8192, 30).inputs, documents=True), flush=True)
    rows: list[dict] = []
    for name, (part, *arguments) in parts().items():
        if re.search(options.only, name):
            rows += part(name, *arguments)
            write_gpu("documents_kernels", rows)  # the result file grows as it goes
