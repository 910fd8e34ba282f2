"""Shared parts of the kernel benchmarks: GPU time by events with the CPU running ahead, launches by the profiler."""

import gc
import time
from collections.abc import Callable, Sequence
from functools import cache

import torch
from report import write

_printed: dict[str, int] = {}  # rows already shown, for a benchmark that writes more than once


def gpu_ms(fn: Callable[[], object], samples: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of one call. The calls queue behind a pause, as a trainer's do behind earlier layers, so
    that what is timed is the GPU's work and the gaps between kernels, not Python.
    """
    for _ in range(warmup):
        fn()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(samples):
        fn()
    host_seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2 * host_seconds * 2e9))  # clock cycles: twice what Python needs to queue the samples
    for before, after in events:
        before.record()
        fn()
        after.record()
    torch.cuda.synchronize()
    return sorted(before.elapsed_time(after) for before, after in events)[samples // 2]


@cache
def copy_tb_s() -> float:
    """TB/s that a copy of 1 GiB reads and writes on this GPU: the rate that memory-bound kernels are compared with."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_ms(lambda: target.copy_(source)) / 1e9


def cpu_ms(fn: Callable[[], object], samples: int = 20) -> float:
    """Median milliseconds that Python needs to launch one call."""
    times = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return sorted(times)[samples // 2]


def kernels(fn: Callable[[], object], calls: int = 5) -> dict[str, tuple[float, float]]:
    """Kernel name -> (launches, microseconds) of one call."""
    from torch.profiler import ProfilerActivity, profile

    fn()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            fn()
        torch.cuda.synchronize()
    found: dict[str, tuple[float, float]] = {}
    for e in profiler.key_averages():
        if e.device_time_total:
            count, us = found.get(e.key[:60], (0.0, 0.0))  # of templates, several begin alike
            found[e.key[:60]] = (count + e.count / calls, us + e.device_time_total / calls)
    return found


def forget() -> None:
    """Give back what a closed engine leaves on the GPU, and what torch has compiled: for the shapes of another case it would get
    slower kernels, for any shape.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()


def write_gpu(benchmark: str, rows: list[dict], notes: Sequence[str] = ()) -> None:
    """Write the result file of this GPU. It may be called again as rows come in."""
    packages = ("torch", "triton", "transformers", "flash-linear-attention", "tilelang", "causal-conv1d")
    write(
        benchmark, rows, packages, machine=torch.cuda.get_device_name(), notes=notes, printed=_printed.get(benchmark, 0)
    )
    _printed[benchmark] = len(rows)
