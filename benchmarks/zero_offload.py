"""OLMo Hybrid 7B, all 7.43 B parameters of it, trained on one GPU of 80 GB at sequence 8192: what must lie in host memory, and what
that costs. Each case runs in a process of its own.

python benchmarks/zero_offload.py [--only REGEX] [--sequences 8] [--steps 2]       one GPU, 128 GiB of host memory
python benchmarks/zero_offload.py --plan                                           the arithmetic alone, anywhere

With P = 7.43e9 parameters, fp32 master weights and moments, gradients accumulated in fp32, and a share f of that on the host:

                    device                                        host
    ZeRO 3          2 P weights + 16 P (1 - f)                    16 P f + 4 P, DeepSpeed's buffer of all gradients
    ZeRO 1, 2       2 P weights + 4 P gradients                   18 P (f = 1 only): more than 128 GiB
    megatron-core   2 P weights + 4 P gradients + 12 P (1 - f)    16 P f

Page-locked buffers come on top of that: PyTorch rounds each up to a power of two.
"""

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

SEQUENCE = 8192
GIB = 2**30
CASES = {
    # name: (engine, share of the optimizer's state on the host)
    "DeepSpeed, ZeRO 3, 60% on the host": ("deepspeed", 0.6),
    "DeepSpeed, ZeRO 3, 65% on the host": ("deepspeed", 0.65),
    "megatron-core's HybridDeviceOptimizer, 80% on the host": ("megatron", 0.8),
}


def plan(engine: str, share: float, parameters: int) -> tuple[float, float]:
    """Bytes on the device and on the host by the arithmetic above, without activations and rounding."""
    if engine == "deepspeed":
        return (2 + 16 * (1 - share)) * parameters, (16 * share + 4) * parameters
    return (6 + 12 * (1 - share)) * parameters, 16 * share * parameters


class HostPeak:
    """The most host memory in use since it was made, beyond what was in use then; page-locked memory counts."""

    def __init__(self):
        self._before = self._used()
        self.bytes, self._stop = 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def _used() -> int:
        memory = psutil.virtual_memory()
        return memory.total - memory.available

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.bytes = max(self.bytes, self._used() - self._before)

    def stop(self) -> int:
        self._stop.set()
        return self.bytes


def build(engine: str, share: float, parts: str, groups):
    from megatron_hybrid.config.run import RunConfig
    from megatron_hybrid.profiling.engine_steps import fill_at_random
    from megatron_hybrid.train.engines.build import build_engine

    config = RunConfig.model_validate(run_config(engine, share, parts))
    built = build_engine(config, groups, fill_at_random)
    print(*built.backends(1), sep="\n", file=sys.stderr, flush=True)
    return built


def run_config(engine: str, share: float, parts: str = "auto") -> dict:
    from megatron_hybrid.config.presets import olmo_hybrid_7b

    deepspeed = engine == "deepspeed"
    zero = {"stage": 3, "offload_optimizer": "cpu", "offload_fraction": share} if deepspeed else {}
    return dict(
        run_dir="unused",
        model=olmo_hybrid_7b().model_dump() | {"backend": parts},
        data={"train": [{"path": "unused"}], "sequence_length": SEQUENCE},
        train={
            "steps": 1,
            "global_batch_size": 1,
            "engine": engine,
            "optimizer": {} if deepspeed else {"offload_fraction": share},
        },
        parallel={"recompute_granularity": "full"},
        zero=zero,
    )


def measure(name: str, batch_sizes: list[int], steps: int, parts: str) -> dict:
    """Seconds of a step by sequences a step, of the update in it, and peak bytes."""
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed
    from megatron_hybrid.profiling.engine_steps import random_batches

    groups = start_distributed(Launch.from_environment(), _parallel(), seed=0, quiet=True)
    host, started = HostPeak(), time.perf_counter()
    engine = build(*CASES[name], parts, groups)
    found: dict = {"setup": time.perf_counter() - started, "steps": {}}
    for count in batch_sizes:
        batches = random_batches(count, 1, SEQUENCE, 100352, seed=0)
        times = []
        for _ in range(steps + 1):
            marks = [time.perf_counter()]
            engine.forward_backward(batches)
            torch.cuda.synchronize()
            marks.append(time.perf_counter())
            engine.update(1e-5, engine.gradient_norm())
            torch.cuda.synchronize()
            marks.append(time.perf_counter())
            times.append((marks[2] - marks[0], marks[2] - marks[1]))
            print(f"{name}: {count} sequences: {times[-1][0]:.1f} s, update {times[-1][1]:.1f} s", file=sys.stderr)
        found["steps"][count] = sorted(times[1:])[len(times[1:]) // 2]
    return found | {"device": torch.cuda.max_memory_allocated(), "host": host.stop()}


def _parallel():
    from megatron_hybrid.config.parallel import ParallelConfig

    return ParallelConfig()


def rows_of(name: str, found: dict, parameters: int) -> list[dict]:
    from report import row

    device, host = plan(*CASES[name], parameters)
    rows = []
    for count, (seconds, update) in found["steps"].items():
        case = f"{name}, {count} sequences a step"
        rows.append(row(case, "tokens", "tokens/s", int(count) * SEQUENCE / seconds, higher_is_better=True))
        rows.append(row(case, "step", "s", seconds))
        rows.append(row(case, "of that, the update", "s", update))
    rows.append(row(name, "peak memory of the GPU", "GiB", found["device"] / GIB))
    rows.append(row(name, "of that, weights and state by the arithmetic", "GiB", device / GIB))
    rows.append(row(name, "peak memory of the host", "GiB", found["host"] / GIB))
    rows.append(row(name, "of that, state by the arithmetic", "GiB", host / GIB))
    rows.append(row(name, "set-up", "s", found["setup"]))
    return rows


def main() -> None:
    from megatron_hybrid.arch.flops import count_parameters
    from megatron_hybrid.config.presets import olmo_hybrid_7b

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8], help="of a step")
    parser.add_argument("--steps", type=int, default=2, help="timed, after one that is not")
    parser.add_argument("--parts", default="auto", help="model.backend: whose linears, norms and attention")
    parser.add_argument("--plan", action="store_true", help="print the arithmetic, run nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()
    if args.case:
        print(json.dumps(measure(args.case, args.sequences, args.steps, args.parts)), flush=True)
        return
    parameters = count_parameters(olmo_hybrid_7b())
    names = [name for name in CASES if re.search(args.only, name)]
    for name in names:
        device, host = (size / GIB for size in plan(*CASES[name], parameters))
        print(f"{name}: {device:.1f} GiB on the GPU and {host:.1f} GiB on the host, and activations", flush=True)
    if args.plan:
        return
    from report import write

    rows: list[dict] = []
    packages = ("torch", "deepspeed", "megatron-core", "transformer-engine")
    for name in names:
        options = ["--sequences", *map(str, args.sequences), "--steps", str(args.steps), "--parts", args.parts]
        done = subprocess.run([sys.executable, __file__, "--case", name, *options], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}: ended with status {done.returncode}", flush=True)
            continue
        before = len(rows)
        rows += rows_of(name, json.loads(done.stdout.splitlines()[-1]), parameters)
        write("zero_offload", rows, packages, machine=torch.cuda.get_device_name(), printed=before)


if __name__ == "__main__":
    main()
