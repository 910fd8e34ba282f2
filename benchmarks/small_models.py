"""Training steps of the small models of examples/expressivity on one GPU: time, kernel launches, and time in which the GPU works.

python benchmarks/small_models.py [--out FOLDER]     about two minutes

A step that takes much longer than its kernels is launch-bound: the host launches kernels more slowly than the GPU runs them.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "examples" / "expressivity")]

STEPS, WARMUP = 20, 5
LENGTHS = (128, 1216)
"""Tokens of samples with 8 and with 128 swaps."""
OPTIMIZERS = {"plain optimizer": "false", "distributed optimizer": "true"}


def cases() -> dict[str, list[str]]:
    """Return the overrides of each case: the five models, and other backends and optimizers of the hybrid."""
    from grid import MODELS, model_overrides

    found = {name: model_overrides(name, "GGGA") for name in MODELS}
    hybrid = found["hybrid_negative"]
    found |= {f"hybrid_negative, backend {backend}": [*hybrid, f"model.backend={backend}"] for backend in ("local",)}
    for name, value in OPTIMIZERS.items():
        found[f"hybrid_negative, {name}"] = [*hybrid, f"parallel.distributed_optimizer={value}"]
    return found


def measured(engine: Any, vocab_size: int, length: int) -> dict[str, float]:
    """Return seconds, kernel seconds and launches of a step of 32 sequences."""
    from torch.profiler import ProfilerActivity, profile

    from megatron_hybrid.data.batch import Batch

    samples = torch.randint(vocab_size, (32, length + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch.of_samples(samples).pin_memory()

    def step() -> None:
        engine.forward_backward([batch])
        engine.update(1e-5, engine.gradient_norm())

    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    return {
        "step": sorted(seconds)[STEPS // 2] * 1e3,
        "kernels of a step": sum(event.self_device_time_total for event in kernels) / 1e3,
        "launches": sum(event.count for event in kernels),
    }


def main() -> None:
    from report import bounded, write

    from megatron_hybrid.config.load import load_run
    from megatron_hybrid.distributed.process_groups import leave_groups
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed
    from megatron_hybrid.train.engines.build import build_engine

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launch, rows = Launch.from_environment().export(), []
    for name, overrides in cases().items():
        config = load_run(str(ROOT / "examples" / "expressivity" / "state_tracking.yaml"), overrides)
        engine = build_engine(config, start_distributed(launch, config.parallel, config.train.seed))
        for length in LENGTHS:
            for metric, value in measured(engine, config.model.vocab_size, length).items():
                unit = "" if metric == "launches" else "ms"
                rows.append(bounded(f"{name}, 32 x {length} tokens", metric, unit, value, None))
                print(rows[-1]["case"], metric, rows[-1]["ours"], unit, flush=True)
        engine.close()
        leave_groups()
    write(
        "small_models",
        rows,
        ("torch", "megatron-core", "transformer-engine"),
        torch.cuda.get_device_name(),
        printed=len(rows),
    )


if __name__ == "__main__":
    main()
