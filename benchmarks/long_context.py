"""Training steps of OLMo Hybrid 7B at 65,536 tokens on two GPUs: context and tensor parallelism against one GPU.

torchrun --nproc-per-node 2 benchmarks/long_context.py       [--only REGEX] [--steps N]

Eight layers (GGGA*2) are divided by context or tensor parallelism, and compared with the same layers under data parallelism, where
each GPU has a sequence of its own. That takes 135 GB. The last cases are the whole model with full recompute. One sequence per step,
except under data parallelism.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

SEQUENCE = 65536
FORMATS = {"bf16": {}, "FP8 tensorwise": {"fp8_recipe": "tensorwise"}}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
GOAL = 0.97
"""Least share of one GPU's rate that CP2 is to reach."""


@dataclass(frozen=True)
class Case:
    """A layout of a part of the model."""

    name: str
    layer_pattern: str
    parallel: dict
    sequences: int = 1
    goal: float | None = None


BASELINE = Case("GGGA*2, one GPU (DP2)", "GGGA*2", OVERLAP, sequences=2)
CASES = (
    Case("GGGA, one GPU (DP2)", "GGGA", OVERLAP, sequences=2),
    BASELINE,
    Case("GGGA*2, CP2", "GGGA*2", {"context_parallel_size": 2, **OVERLAP}, goal=GOAL),
    Case("GGGA*2, TP2", "GGGA*2", {"tensor_parallel_size": 2}),
    Case("GGGA*2, TP2, overlapped", "GGGA*2", {"tensor_parallel_size": 2, "tp_comm_overlap": True}),
    Case(
        "whole, CP2, full recompute", "GGGA*8", {"context_parallel_size": 2, "recompute_granularity": "full", **OVERLAP}
    ),
    Case("whole, TP2, full recompute", "GGGA*8", {"tensor_parallel_size": 2, "recompute_granularity": "full"}),
)


def measure(case: Case, precision: dict, groups, steps: int) -> dict[str, float]:
    """Seconds of a step and peak bytes, of the slowest and the fullest rank."""
    from train_step import timed

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.precision import PrecisionConfig
    from megatron_hybrid.config.train import TrainConfig
    from megatron_hybrid.profiling.engine_steps import fill_at_random, random_batches
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    model, train = model_of(case), TrainConfig(steps=1, global_batch_size=case.sequences, dtype="bf16")
    torch.cuda.reset_peak_memory_stats()
    engine = MegatronEngine(
        model, train, ParallelConfig(**case.parallel), SEQUENCE, groups, PrecisionConfig(**precision), fill_at_random
    )
    batches = random_batches(1, 1, SEQUENCE, model.vocab_size, seed=groups.dp.rank())
    found = timed(engine, batches, steps)
    found.pop("step")
    engine.close()
    everyone: list[dict | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return {name: max(one[name] for one in everyone if one) for name in found}


def model_of(case: Case):
    """OLMo Hybrid 7B without rotary embedding, as in its long-context stage, with some of its layers."""
    from megatron_hybrid.config.presets import olmo_hybrid_7b

    return olmo_hybrid_7b().model_copy(update={"layer_pattern": case.layer_pattern, "rope_theta": None})


def rows_of(case: Case, label: str, found: dict[str, float], baseline: float | None) -> tuple[list[dict], float]:
    """Rows of the result file, and tokens per second and GPU."""
    from report import row

    from megatron_hybrid.arch.flops import training_flops_per_token

    tokens = case.sequences * SEQUENCE / found["seconds"] / dist.get_world_size()
    tflops = tokens * training_flops_per_token(model_of(case), SEQUENCE) / 1e12
    name = f"{case.name}, {label}"
    compared = baseline and case is not BASELINE and case.layer_pattern == BASELINE.layer_pattern
    peer = dict(peer=baseline, peer_name=BASELINE.name, goal=case.goal) if compared else {}
    rows = [
        row(name, "tokens", "tokens/s per GPU", tokens, higher_is_better=True, **peer),
        row(name, "work", "TFLOP/s per GPU", tflops, higher_is_better=True),
        row(name, "peak memory", "GB", found["bytes"] / 1e9),
    ]
    return rows, tokens


def main() -> None:
    from kernel_timing import forget, write_gpu

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.distributed.process_groups import leave_groups, stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--steps", type=int, default=3)
    args, _ = parser.parse_known_args()
    launch, done = Launch.from_environment(), list[dict]()
    baseline: dict[str, float] = {}
    if launch.world_size != 2:
        sys.exit("start it on two GPUs: torchrun --nproc-per-node 2 benchmarks/long_context.py")
    for case in CASES:
        groups = start_distributed(launch, ParallelConfig(**case.parallel), seed=0, quiet=bool(done))
        for label, precision in FORMATS.items():
            if not re.search(args.only, f"{case.name}, {label}"):
                continue
            found = measure(case, precision, groups, args.steps)
            rows, tokens = rows_of(case, label, found, baseline.get(label))
            if case is BASELINE:
                baseline[label] = tokens
            done += rows
            forget()
            if launch.rank == 0:
                write_gpu("long_context_x2", done)
        leave_groups()
    stop_distributed()


if __name__ == "__main__":
    main()
