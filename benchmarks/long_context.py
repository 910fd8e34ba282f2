"""Training steps of OLMo Hybrid 7B at 65,536 tokens under context and tensor parallelism.

torchrun --nproc-per-node 2 benchmarks/long_context.py       [--only REGEX] [--steps N]
torchrun --nproc-per-node 8 benchmarks/long_context.py       [--cases FILE: also as planner_errors.py reads them]

On two GPUs, eight layers (GGGA*2) are divided by context or tensor parallelism, and compared with the same layers under data
parallelism, where each GPU has a sequence of its own. That takes 135 GB. The last cases are the whole model with full recompute. On
eight GPUs, the whole model is compared with the planner's prediction, without documents and with documents as in web text. One
sequence per step, except under data parallelism.
"""

import argparse
import json
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
WHOLE = "GGGA*8"
MEAN_DOCUMENT = 660
"""Mean tokens of documents.py's documents: log-normal with a median of 400."""
RATES = {"bf16": 9_500, "FP8 tensorwise": 12_000}
"""Goals of the whole model on eight H200s, in tokens/s per GPU."""


@dataclass(frozen=True)
class Case:
    """A layout of a part of the model."""

    name: str
    layer_pattern: str
    parallel: dict
    sequences: int = 1
    goal: float | None = None
    documents: bool = False


BASELINE = Case("GGGA*2, one GPU (DP2)", "GGGA*2", OVERLAP, sequences=2)
CP8 = {"context_parallel_size": 8, **OVERLAP}
TP2_CP4 = {"tensor_parallel_size": 2, "context_parallel_size": 4, **OVERLAP}
CASES = {
    2: (
        Case("GGGA, one GPU (DP2)", "GGGA", OVERLAP, sequences=2),
        BASELINE,
        Case("GGGA*2, CP2", "GGGA*2", {"context_parallel_size": 2, **OVERLAP}, goal=GOAL),
        Case("GGGA*2, TP2", "GGGA*2", {"tensor_parallel_size": 2}),
        Case("GGGA*2, TP2, overlapped", "GGGA*2", {"tensor_parallel_size": 2, "tp_comm_overlap": True}),
        Case(
            "whole, CP2, full recompute",
            WHOLE,
            {"context_parallel_size": 2, "recompute_granularity": "full", **OVERLAP},
        ),
        Case("whole, TP2, full recompute", WHOLE, {"tensor_parallel_size": 2, "recompute_granularity": "full"}),
    ),
    8: (
        Case("whole, CP8", WHOLE, CP8),
        Case("whole, TP2 x CP4", WHOLE, TP2_CP4),
        Case("whole, CP8, documents", WHOLE, CP8, documents=True),
        Case("whole, TP2 x CP4, documents", WHOLE, TP2_CP4, documents=True),
    ),
}
"""Cases by the number of GPUs."""


def measure(case: Case, precision: dict, groups, steps: int) -> dict[str, float]:
    """Seconds of a step and peak bytes, of the slowest and the fullest rank."""
    from documents import batches_of
    from train_step import timed

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.precision import PrecisionConfig
    from megatron_hybrid.config.train import TrainConfig
    from megatron_hybrid.profiling.engine_steps import fill_at_random
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    model, train = model_of(case), TrainConfig(steps=1, global_batch_size=case.sequences, dtype="bf16")
    torch.cuda.reset_peak_memory_stats()
    engine = MegatronEngine(
        model, train, ParallelConfig(**case.parallel), SEQUENCE, groups, PrecisionConfig(**precision), fill_at_random
    )
    batches = batches_of("many" if case.documents else "none", 1, SEQUENCE, model.vocab_size, seed=groups.dp.rank())
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
    from report import at_least, row

    from megatron_hybrid.arch.flops import training_flops_per_token

    tokens = case.sequences * SEQUENCE / found["seconds"] / dist.get_world_size()
    tflops = tokens * training_flops_per_token(model_of(case), SEQUENCE) / 1e12
    name = f"{case.name}, {label}"
    compared = baseline and case is not BASELINE and case.layer_pattern == BASELINE.layer_pattern
    peer = dict(peer=baseline, peer_name=BASELINE.name, goal=case.goal) if compared else {}
    if dist.get_world_size() == 8:
        first = at_least(name, "tokens", "tokens/s per GPU", tokens, RATES[label], predicted(case, label), "planner")
    else:
        first = row(name, "tokens", "tokens/s per GPU", tokens, higher_is_better=True, **peer)
    rows = [
        first,
        row(name, "work", "TFLOP/s per GPU", tflops, higher_is_better=True),
        row(name, "peak memory", "GB", found["bytes"] / 1e9),
    ]
    return rows, tokens


def predicted(case: Case, label: str) -> float:
    """Return the planner's tokens per second and GPU on eight H200s. Documents are as long as those of web text."""
    from planner_errors import plan_of

    from megatron_hybrid.planner.hardware import load
    from megatron_hybrid.planner.timing import StepPredictor

    plan = plan_of(planner_case(case, label, 8, {}), MEAN_DOCUMENT)
    return StepPredictor(load("h200")).step(plan).tokens_per_gpu


def planner_case(case: Case, label: str, world: int, measured: dict[str, float]) -> dict:
    """As planner_memory.py writes one, held out."""
    import planner_memory

    return planner_memory.Case(
        f"{case.name}, 65,536 tokens, {label}",
        world,
        case.layer_pattern,
        SEQUENCE,
        microbatches=1,
        held_out=True,
        parallel=case.parallel,
        precision=FORMATS[label],
        model={"rope_theta": None},
        data={"documents": "mask"} if case.documents else {},
    ).record(measured)


def main() -> None:
    from kernel_timing import forget, write_gpu

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.distributed.process_groups import leave_groups, stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cases", type=Path, help="measured cases, as planner_errors.py reads them")
    args, _ = parser.parse_known_args()
    launch, done, cases = Launch.from_environment(), list[dict](), list[dict]()
    baseline: dict[str, float] = {}
    if launch.world_size not in CASES:
        sys.exit("start it on two or eight GPUs: torchrun --nproc-per-node 8 benchmarks/long_context.py")
    for case in CASES[launch.world_size]:
        groups = start_distributed(launch, ParallelConfig(**case.parallel), seed=0, quiet=bool(done))
        for label, precision in FORMATS.items():
            if not re.search(args.only, f"{case.name}, {label}"):
                continue
            found = measure(case, precision, groups, args.steps)
            rows, tokens = rows_of(case, label, found, baseline.get(label))
            if case is BASELINE:
                baseline[label] = tokens
            done += rows
            measured = {"seconds": found["seconds"], "peak_bytes": found["bytes"]}
            cases.append(planner_case(case, label, launch.world_size, measured))
            forget()
            if launch.rank == 0:
                write_gpu(f"long_context_x{launch.world_size}", done)
                if args.cases:
                    args.cases.write_text(json.dumps(cases))
        leave_groups()
    stop_distributed()


if __name__ == "__main__":
    main()
