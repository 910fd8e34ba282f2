"""Difference of training on GPUs from its oracle, as tests/gpu/test_training.py checks it: one GPU from the CPU, FP8 from bf16,
layouts from one GPU. Largest relative differences over ten steps.

    --layouts [REGEX]    of what runs on one GPU, only what layouts are compared with; of these those whose name it finds
    --documents          only runs on packed documents; their result file is document_parity
    --small-suite        only blocks of AI2's small suite, on one GPU; their result file is small_suite_parity
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]


def rows_of(case: str, expected: dict, found: dict, goal: float) -> Iterator[dict]:
    """Yield the differences of a curve from the expected one. Gradient norms may differ by ten times the goal."""
    from report import bounded

    from testing import gpu_jobs as jobs

    yield bounded(case, "loss", "relative", jobs.difference(expected, found, "losses"), goal)
    yield bounded(case, "gradient norm", "relative", jobs.difference(expected, found, "norms"), 10 * goal)
    if "resumed" in found and not jobs.same_bits(case):
        worst = jobs.difference(found, found | {"losses": found["resumed"]}, "losses")
        yield bounded(f"{case}, resumed", "loss", "relative", worst, 1e-6)
    elif "resumed" in found:
        same = found["resumed"] == found["losses"] and found["same_parameters"]
        yield bounded(f"{case}, resumed", "losses and parameters that differ", "", int(not same), 0)
    if "otherwise" in found:
        worst = jobs.difference(found, found | {"losses": found["otherwise"]}, "losses")
        yield bounded(f"{case}, resumed without", "loss", "relative", worst, 2e-3)
    if found.get("same_casts") is not None:
        differ = int(not found["same_casts"])
        yield bounded(f"{case}, against a cast of whole weights", "bytes that differ", "", differ, 0)


def layout_rows(one_gpu: dict[str, dict], found: dict[str, dict]) -> Iterator[dict]:
    """Yield the differences of layouts from the same training on one GPU."""
    from testing import gpu_jobs as jobs

    for name, result in found.items():
        like = jobs.one_gpu_of(name)
        goal = 1e-2 if like in jobs.FP8_FORMATS else 1e-4
        yield from rows_of(f"{name}: from one GPU", one_gpu[like], result, goal)


def main() -> None:
    import torch
    from kernel_timing import write_gpu

    from testing import gpu_jobs as jobs

    parser = argparse.ArgumentParser()
    parser.add_argument("--layouts", nargs="?", const="")
    parser.add_argument("--documents", dest="kind", action="store_const", const=jobs.DOCUMENTS, default="")
    parser.add_argument("--small-suite", dest="kind", action="store_const", const=jobs.SUITE)
    args, _ = parser.parse_known_args()
    benchmark = {"": "gpu_parity", jobs.DOCUMENTS: "document_parity", jobs.SUITE: "small_suite_parity"}[args.kind]
    rows: list[dict] = []

    def compare(case: str, expected: dict, found: dict, goal: float) -> None:
        rows.extend(rows_of(case, expected, found, goal))

    gpus = list(range(torch.cuda.device_count()))
    first, rest = (gpus[:2], gpus[2:4]) if len(gpus) >= 4 else (gpus, [])
    names = {*jobs.IN_FP32, "bf16", *jobs.FP8_FORMATS} if args.layouts is not None else ()
    if args.kind:
        names = {f"{name}{args.kind}" for name in ("fp32", "fp32, wide", "bf16", *jobs.DOCUMENT_FORMATS)}
    only = args.kind or args.layouts or ""
    pool = ThreadPoolExecutor()
    cpu_part = pool.submit(jobs.on_cpu)
    second = pool.submit(on_two, rest, only) if rest else None  # on the GPUs that the first part leaves
    with tempfile.TemporaryDirectory() as folder:
        gpu = jobs.on_one_gpu(Path(folder), first, names)
    on_four = pool.submit(jobs.on_several, 4, (), only) if rest else None
    cpu = cpu_part.result()
    for name in (name for name in jobs.IN_FP32 if name in gpu):
        compare(f"{name}: a GPU from the CPU", cpu[name], gpu[name], 1e-4)
    for name in ("bf16, local", "bf16"):
        if name in gpu:
            compare(f"{name}: a GPU from the CPU in fp32", cpu["fp32"], gpu[name], 1e-2)
    kinds = (jobs.DOCUMENTS, jobs.SUITE)
    for kind in kinds:
        if f"bf16{kind}" in gpu:
            compare(f"bf16{kind}: a GPU from the CPU in fp32", cpu[f"fp32{kind}"], gpu[f"bf16{kind}"], 1e-2)
    for name, without in {**jobs.HELD, **jobs.SKIPPED}.items():
        if name in gpu:
            compare(f"{name}: from {without}", gpu[without], gpu[name], 2e-3)
    for name, (without, _) in jobs.OFFLOADED.items():
        if name in gpu:
            compare(f"{name}: from {without}", gpu[without], gpu[name], 1e-5 if without == "fp32" else 2e-3)
    for name in gpu:
        if name in jobs.OFFLOADED:
            continue
        if name.startswith("fp8") and name not in jobs.HELD:
            base = next((f"bf16{kind}" for kind in kinds if name.endswith(kind)), "bf16")
            compare(f"{name}: from {base}", gpu[base], gpu[name], 2e-2)
        elif "recompute" in name:
            compare(f"{name}: from bf16", gpu["bf16"], gpu[name], 0.0)
    write_gpu(benchmark, rows)

    if on_four:
        rows += layout_rows(gpu, on_four.result())
        write_gpu(benchmark, rows)
    if len(gpus) >= 2 and args.kind != jobs.SUITE:
        layouts, pairs = second.result() if second else on_two(gpus[:2], only)
        rows += layout_rows(gpu, layouts)
        for name, (plain, found) in pairs.items():
            compare(f"TP2, overlapped, {name}: from TP2", plain, found, 5e-3)
        write_gpu(benchmark, rows)


def on_two(gpus: list[int], only: str) -> tuple[dict, dict]:
    """Return the results of two GPUs: layouts, and pairs without and with overlapped exchanges if Transformer Engine is there."""
    from testing import gpu_jobs as jobs

    pairs = jobs.overlapped(gpus) if find_spec("transformer_engine") and re.search(only, "TP2, overlapped") else {}
    return jobs.on_several(2, gpus, only), pairs


if __name__ == "__main__":
    main()
