"""One training step of a slice of OLMo Hybrid 7B (its widths, four or eight of its layers) on the GPUs at hand: bf16, sequence
8192, forward, backward, optimizer, as the trainer runs it.

python benchmarks/train_step.py            (torchrun for several GPUs: data parallel)
"""

import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

SEQUENCE = 8192
CASES = {"GGGA": "none", "GGGA*2": "none", "GGGA*2, selective recompute": "selective"}


def measure(pattern: str, recompute: str, groups, steps: int = 8) -> dict:
    """Median seconds of a step, and peak memory, of a model of this pattern."""
    from megatron_hybrid.config.flops import training_flops_per_token
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.presets import olmo_hybrid_7b
    from megatron_hybrid.config.train import TrainConfig
    from megatron_hybrid.train.engine import MegatronEngine

    model = olmo_hybrid_7b().model_copy(update={"layer_pattern": pattern.split(",")[0]})
    train = TrainConfig(steps=1, global_batch_size=groups.dp.size(), dtype="bf16")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine = MegatronEngine(model, train, ParallelConfig(recompute=recompute), SEQUENCE, groups)
    for line in engine.backends(1):
        print(line, flush=True)
    tokens = torch.randint(0, model.vocab_size, (1, SEQUENCE + 1))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": torch.ones(1, SEQUENCE)}
    seconds = []
    for _ in range(steps + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.forward_backward([batch])
        engine.update(1e-4, engine.gradient_norm())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    step = sorted(seconds[3:])[steps // 2]
    flops = training_flops_per_token(model, SEQUENCE) * SEQUENCE
    return {
        "step": step * 1e3,
        "tokens": SEQUENCE / step,
        "tflops": flops / step / 1e12,
        "memory": torch.cuda.max_memory_allocated() / 1e9,
    }


def main() -> None:
    from kernel_timing import write_gpu
    from report import row

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.parallel.launch import Launch, start_distributed, stop_distributed

    groups = start_distributed(Launch.from_environment(), ParallelConfig(), seed=0)
    rows = []
    for case, recompute in CASES.items():
        found = measure(case, recompute, groups)
        for metric, unit in (("step", "ms"), ("tokens", "tokens/s/GPU"), ("tflops", "TFLOP/s"), ("memory", "GB")):
            rows.append(row(case, metric, unit, found[metric], higher_is_better=metric in ("tokens", "tflops")))
    if groups.dp.rank() == 0:
        write_gpu("train_step", rows)
    stop_distributed()


if __name__ == "__main__":
    main()
