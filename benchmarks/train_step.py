"""Training steps of OLMo Hybrid 7B on the GPUs at hand, as the trainer runs them: forward, backward, optimizer, at sequence 8192.

python benchmarks/train_step.py                                    one GPU: slices of the model (its widths, four of its layers)
torchrun --nproc-per-node 2 benchmarks/train_step.py               several: the whole model, by layout and format
    --only REGEX   cases whose name it finds      --profile   where the time goes, by kind of kernel
    --cases FILE   also as planner_errors.py reads them
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

SEQUENCE = 8192
PEAK_TFLOPS = 989  # dense bf16, also for FP8
FORMATS = {
    "bf16": {},
    "FP8 tensorwise": {"fp8_recipe": "tensorwise"},
    "FP8 tensorwise, parameters": {"fp8_recipe": "tensorwise", "fp8_param_gather": True},
    "FP8 tensorwise, attention": {"fp8_recipe": "tensorwise", "fp8_attention": True},
    "FP8 delayed, attention": {"fp8_recipe": "delayed", "fp8_attention": True},
    "FP8 blockwise": {"fp8_recipe": "blockwise"},
}
GOALS = {  # tokens/s per GPU of the whole model on H200s: bf16, FP8
    "TP1 x DP2": (13_300, 18_500),
    "TP1 x DP4": (13_400, 19_800),
    "TP2, overlapped": (12_300, 17_200),
    "TP4": (10_000, 12_500),
    "PP2, VPP4": (12_600, 17_700),
    "PP4, VPP2": (11_000, 15_800),
}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def pipeline(stages: int, virtual: int = 1, **more) -> dict:
    return {"pipeline_parallel_size": stages, "virtual_pipeline_parallel_size": virtual, **more}


LAYOUTS = {
    1: {"TP1": {}},
    2: {
        "TP1 x DP2": OVERLAP,
        "TP2": {"tensor_parallel_size": 2},
        "TP2, overlapped": {"tensor_parallel_size": 2, "tp_comm_overlap": True},
        "PP2": pipeline(2),
        "PP2, VPP4": pipeline(2, 4),
        "PP2, VPP4, exchanges waited for": pipeline(2, 4, overlap_p2p_comm=False),
        "CP2": {"context_parallel_size": 2, **OVERLAP},
    },
    4: {
        "TP1 x DP4": OVERLAP,
        "TP2 x DP2": {"tensor_parallel_size": 2, **OVERLAP},
        "TP2 x DP2, overlapped": {"tensor_parallel_size": 2, "tp_comm_overlap": True, **OVERLAP},
        "TP4": {"tensor_parallel_size": 4},
        "TP4, overlapped": {"tensor_parallel_size": 4, "tp_comm_overlap": True},
        "PP2 x DP2": pipeline(2, **OVERLAP),
        "PP2, VPP4, DP2": pipeline(2, 4, **OVERLAP),
        "PP2, VPP4, DP2, exchanges waited for": pipeline(2, 4, overlap_p2p_comm=False, **OVERLAP),
        "PP4": pipeline(4),
        "PP4, VPP2": pipeline(4, 2),
        "PP4, VPP2, exchanges waited for": pipeline(4, 2, overlap_p2p_comm=False),
        "CP4": {"context_parallel_size": 4, **OVERLAP},
        "TP2 x CP2": {"tensor_parallel_size": 2, "context_parallel_size": 2, **OVERLAP},
    },
    8: {
        "TP1 x DP8": OVERLAP,
        "TP2 x DP4, overlapped": {"tensor_parallel_size": 2, "tp_comm_overlap": True, **OVERLAP},
        "PP2, VPP4, DP4": pipeline(2, 4, **OVERLAP),
        "PP4, VPP2, DP2": pipeline(4, 2, **OVERLAP),
        "TP2, PP2, VPP4, DP2": pipeline(2, 4, tensor_parallel_size=2, **OVERLAP),
        "CP2 x DP4": {"context_parallel_size": 2, **OVERLAP},
    },
}
KINDS = {  # of kernels, by parts of their names; the first that fits
    "waiting for other stages": ("pipeline",),
    "communication": ("nccl", "userbuffers", "ptop"),
    "attention": ("fmha", "flash", "cudnn_generated", "sdpa"),
    "SwiGLU": ("gated_act", "swiglu", "gated_kernel", "silu_split"),
    "matrix products": ("gemm", "nvjet", "cutlass", "splitk", "cublas"),
    "delta rule": ("forward_scan", "reverse_scan", "prepare_kernel", "gradients_kernel", "join"),
    "convolution and gates": ("conv_gates",),
    "loss head": ("losses_kernel", "scale_kernel", "cross_entropy"),
    "RMSNorm": ("rmsnorm",),
    "gated norm, q and k norm, RoPE": ("forward_kernel", "backward_kernel", "qk_", "halves"),
    "casts to FP8": ("quantize", "cast_", "transpose", "amax"),
    "optimizer and gradient norm": ("multi_tensor", "adam", "l2norm"),
}


def timed(engine, batches, steps: int) -> dict:
    """Median seconds of a step under load, and peak bytes, on this rank; ready to be profiled afterwards."""
    from megatron_hybrid.profiling.engine_steps import measure_engine, train_one_step

    found = measure_engine(engine, batches, steps)
    memory = {"bytes": found.peak_bytes, "reserved": found.reserved_bytes}
    return {"seconds": found.seconds, "step": partial(train_one_step, engine, batches, 1e-5)} | memory


def kernel_kinds(engine_step) -> dict[str, float]:
    """Kind of kernel -> milliseconds of one step on this GPU; kernels that overlap count each."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine_step()
        torch.cuda.synchronize()
    kinds, names = defaultdict(float), defaultdict(float)
    for event in profiler.key_averages():
        if event.device_time_total:
            name = event.key.lower()
            if name.startswith("nccldevkernel") and "sendrecv" in name:
                name = "pipeline"
            kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "other elementwise")
            kinds[kind] += event.device_time_total / 1e3
            names[f"{kind}: {event.key[:90]} x{event.count}"] += event.device_time_total / 1e3
    for name, ms in sorted(names.items(), key=lambda item: -item[1])[:60]:
        print(f"{ms:9.2f} ms  {name}", flush=True)
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def run_case(model, parallel: dict, precision: dict, groups, args) -> dict:
    """Build the engine, time it, take it apart."""
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.precision import PrecisionConfig
    from megatron_hybrid.config.train import TrainConfig
    from megatron_hybrid.profiling.engine_steps import fill_at_random, random_batches
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    train = TrainConfig(steps=1, global_batch_size=args.sequences, micro_batch_size=args.micro, dtype="bf16")
    config = ParallelConfig(**parallel, recompute_granularity=args.recompute)
    torch.cuda.reset_peak_memory_stats()
    engine = MegatronEngine(
        model, train, config, SEQUENCE, groups, precision=PrecisionConfig(**precision), fill=fill_at_random
    )
    if groups.dp_cp.rank() == groups.tp.rank() == groups.pp.rank() == 0:
        print(*engine.backends(1), sep="\n", flush=True)
    dp = groups.dp
    count = args.sequences // dp.size() // args.micro
    batches = random_batches(count, args.micro, SEQUENCE, model.vocab_size, seed=dp.rank())
    found = timed(engine, batches, args.steps)
    step = found.pop("step")
    found |= {"kinds": kernel_kinds(step) if args.profile else {}, "microbatches": count}
    engine.close()
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return found | {name: max(one[name] for one in everyone) for name in ("seconds", "bytes", "reserved")}


def rows_of(case: str, layout: str, found: dict, model, args, whole: bool) -> list[dict]:
    from report import at_least, row

    from megatron_hybrid.arch.flops import training_flops_per_token

    world = dist.get_world_size()
    tokens = args.sequences * SEQUENCE / found["seconds"] / world
    tflops = tokens * training_flops_per_token(model, SEQUENCE) / 1e12
    goal = GOALS.get(layout, (None, None))["FP8" in case] if whole else None
    rows = [
        at_least(case, "tokens", "tokens/s/GPU", tokens, goal),
        row(case, "work", "TFLOP/s/GPU", tflops, higher_is_better=True),
        row(case, "MFU", "of 989 TFLOP/s", tflops / PEAK_TFLOPS, higher_is_better=True),
        row(case, "peak memory", "GB", found["bytes"] / 1e9),
    ]
    total = sum(found["kinds"].values())
    return rows + [row(case, f"kernels: {kind}", f"ms of {total:.0f}", ms) for kind, ms in found["kinds"].items()]


def planner_case(case: str, found: dict, parallel: dict, precision: dict, args) -> dict:
    """As planner_memory.py writes one."""
    from planner_memory import WHOLE, Case

    sizes = (WHOLE, SEQUENCE, args.micro, found["microbatches"])
    parallel = parallel | {"recompute_granularity": args.recompute}
    measured = {"seconds": found["seconds"], "peak_bytes": found["bytes"], "reserved_bytes": found["reserved"]}
    return Case(case, dist.get_world_size(), *sizes, parallel=parallel, precision=precision).record(measured)


def main() -> None:
    from kernel_timing import forget, write_gpu

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.presets import olmo_hybrid_7b
    from megatron_hybrid.distributed.process_groups import leave_groups, stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    parser.add_argument("--layers", default=None, help="pattern; default: the whole model, four layers on one GPU")
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--sequences", type=int, default=8, help="of a global batch")
    parser.add_argument("--micro", type=int, default=1, help="sequences of a micro-batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--cases", type=Path, help="measured cases, as planner_errors.py reads them")
    args, _ = parser.parse_known_args()
    launch = Launch.from_environment()
    if launch.world_size not in LAYOUTS:
        sys.exit(
            f"{launch.world_size} ranks: layouts are those of {', '.join(map(str, LAYOUTS))} GPUs; start as many ranks"
        )
    whole = args.layers is None and launch.world_size > 1
    model = olmo_hybrid_7b()
    if not whole:
        model = model.model_copy(update={"layer_pattern": args.layers or "GGGA"})
    rows: list[dict] = []
    cases: list[dict] = []
    for layout, parallel in LAYOUTS[launch.world_size].items():
        groups = start_distributed(launch, ParallelConfig(**parallel), seed=0, quiet=bool(rows))
        for name, precision in FORMATS.items():
            if parallel.get("tp_comm_overlap") and name == "FP8 blockwise":  # its scales do not travel
                continue
            case = f"{'whole' if whole else model.layer_pattern}, {layout}, {name}"
            if args.recompute != "none":
                case += f", {args.recompute} recompute"
            if args.micro > 1:
                case += f", micro-batch {args.micro}"
            if not re.search(args.only, case):
                continue
            try:
                found = run_case(model, parallel, precision, groups, args)
            except torch.OutOfMemoryError as error:
                print(f"{case}: does not fit: {str(error)[:150]}", flush=True)
                stop_distributed()
                raise SystemExit(1) from None
            rows += rows_of(case, layout, found, model, args, whole)
            cases.append(planner_case(case, found, parallel, precision, args))
            del found
            forget()
            if launch.rank == 0:
                write_gpu("train_step" if launch.world_size == 1 else f"train_step_x{launch.world_size}", rows)
                if whole and args.cases:
                    args.cases.write_text(json.dumps(cases))
        leave_groups()
    stop_distributed()


if __name__ == "__main__":
    main()
