"""What the kernel benchmarks share: GPU time by events with the CPU running ahead, and the result file."""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

_printed = [0]  # rows already shown, for a benchmark that writes more than once
RESULTS = Path(__file__).resolve().parent / "results"


def gpu_ms(fn: Callable[[], object], samples: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of one call. The calls queue behind a pause, as a trainer's do behind earlier layers, so
    that what is timed is the GPU's work and the gaps between kernels, not Python."""
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
    return {
        e.key[:60]: (e.count / calls, e.device_time_total / calls)
        for e in profiler.key_averages()
        if e.device_time_total
    }


def row(case, metric, unit, ours, peer=None, peer_name=None, goal=None, higher_is_better=False) -> dict:
    """One row of a result file; `ratio` above 1 means that ours is better."""
    ratio = None
    if peer is not None and ours:
        ratio = round(ours / peer if higher_is_better else peer / ours, 3)
    met = None if goal is None or ratio is None else ratio >= goal
    values = dict(ours=_short(ours), peer=_short(peer), peer_name=peer_name, ratio=ratio, goal=goal, met=met)
    return dict(case=case, metric=metric, unit=unit, **values)


def _short(x):
    return float(f"{x:.4g}") if isinstance(x, float) else x


def write(benchmark: str, rows: list[dict]) -> None:
    """benchmarks/results/<benchmark>-<gpu>.json, or under --out; prints the rows too."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", default=None, help="where git is not at hand")
    args, _ = parser.parse_known_args()
    gpu = torch.cuda.get_device_name()
    short = next((name for name in ("H100", "H200", "A100", "B200") if name in gpu), gpu.replace(" ", "-"))
    commit = args.commit
    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
        commit = git.stdout.strip() or None
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "flash-linear-attention", "tilelang"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    result = dict(
        benchmark=benchmark,
        date=datetime.date.today().isoformat(),
        commit=commit,
        command=f"python benchmarks/{Path(sys.argv[0]).name}",
        machine=gpu,
        versions=versions,
        rows=rows,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    lines = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)[:-2]
    lines += ',\n "rows": [\n  ' + ",\n  ".join(json.dumps(r) for r in rows) + "\n ]\n}\n"
    (args.out / f"{benchmark}-{short}.json").write_text(lines)
    for r in rows[_printed[0] :]:
        print(*(f"{k}={v}" for k, v in r.items() if v is not None), flush=True)
    _printed[0] = len(rows)
