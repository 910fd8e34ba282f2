"""Training steps of four layers of OLMo Hybrid 7B with and without documents: time, memory, launches and synchronizations.

python benchmarks/documents.py                                one GPU, about four minutes
torchrun --nproc-per-node 2 benchmarks/documents.py           CP2

Lengths of documents are log-normal with a median of 400 tokens, as in web text. With few documents and with many, a step launches the
same kernels and waits for the GPU as often.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

PATTERN, TOKENS = "GGGA", 65_536
SEQUENCES = (8192, 65_536)
KINDS = ("none", "few", "many")
"""Documents of a sequence: one, two, and as in web text."""
FORMATS = {"bf16": {}, "FP8 tensorwise": {"fp8_recipe": "tensorwise"}}
SLOWER = {8192: 0.9, 65_536: 0.9}
"""Goals for the time without documents over the time with many."""
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def batches_of(kind: str, count: int, length: int, vocab_size: int, seed: int) -> list:
    """Return micro-batches of one sequence in page-locked memory, as the loader does."""
    import numpy as np

    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.data.sample import Sample, SampleCounts, starts_of
    from megatron_hybrid.profiling.engine_steps import random_batches

    if kind == "none":
        return [batch.pin_memory() for batch in random_batches(count, 1, length, vocab_size, seed)]
    random, found = np.random.default_rng(seed), []
    for _ in range(count):
        lengths = [length // 3] if kind == "few" else random.lognormal(np.log(400), 1.0, length).astype(int) + 1
        firsts = np.cumsum(lengths)
        starts = starts_of(np.r_[0, firsts[firsts < length]], length)
        tokens = random.integers(0, vocab_size, length + 1)
        mask = np.ones(length, np.float32)
        mask[np.flatnonzero(np.diff(starts))] = 0
        counted = int(mask.sum())
        counts = SampleCounts(length, counted, length - counted)
        found.append(Batch.collate([Sample(tokens[:-1], tokens[1:], mask, starts, counts)]).pin_memory())
    return found


def calls(step) -> dict[str, int]:
    """Return how many kernels a step launches, and how often the host waits for the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {
        "kernel launches": sum(counts.get(name, 0) for name in LAUNCHES),
        "synchronizations": sum(counts.get(name, 0) for name in WAITS),
    }


def measured(engine, batches, steps: int) -> dict[str, float]:
    """Return the median seconds of a step under load, its peak bytes, and its calls, on this rank."""
    from megatron_hybrid.profiling.engine_steps import measure_engine, train_one_step

    torch.cuda.reset_peak_memory_stats()
    found = measure_engine(engine, batches, steps)
    step = partial(train_one_step, engine, batches, 1e-5)
    return {"seconds": found.seconds, "bytes": found.peak_bytes} | calls(step)


def slowest(found: dict[str, float]) -> dict[str, float]:
    """Return the largest value of each figure over all ranks."""
    everyone: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return {name: max(one[name] for one in everyone) for name in found}


def run_case(model, length: int, precision: dict, groups, args) -> dict[str, dict]:
    """Return what is measured of one engine, by kind of documents: the same weights, kernels and memory for all."""
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.precision import PrecisionConfig
    from megatron_hybrid.config.train import TrainConfig
    from megatron_hybrid.profiling.engine_steps import fill_at_random
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    count = max(1, args.tokens // length)
    train = TrainConfig(steps=1, global_batch_size=count, micro_batch_size=1, dtype="bf16")
    parallel = ParallelConfig(context_parallel_size=groups.cp.size())
    options = dict(precision=PrecisionConfig(**precision), fill=fill_at_random, documents=True)
    engine = MegatronEngine(model, train, parallel, length, groups, **options)
    if dist.get_rank() == 0:
        print(*engine.backends(1), sep="\n", flush=True)
    found = {}
    for kind in KINDS:
        batches = batches_of(kind, count, length, model.vocab_size, seed=0)
        found[kind] = slowest(measured(engine, batches, args.steps))
    engine.close()
    return found


def rows_of(case: str, length: int, tokens: int, found: dict[str, dict]) -> list[dict]:
    from report import bounded, row

    rows, without = [], found["none"]
    for kind in KINDS[1:]:
        with_documents, title = found[kind], f"{case}, {kind} documents"
        rates = (tokens / one["seconds"] / dist.get_world_size() for one in (with_documents, without))
        goal = SLOWER[length] if kind == "many" else None
        rows += [
            row(title, "tokens", "tokens/s per GPU", *rates, "no documents", goal=goal, higher_is_better=True),
            row(title, "peak memory", "GB", with_documents["bytes"] / 1e9, without["bytes"] / 1e9, "no documents"),
        ]
    for what in ("kernel launches", "synchronizations"):
        more = found["many"][what] - found["few"][what]
        rows.append(bounded(case, f"{what} of a step with many documents, beyond those with few", "", more, 0))
        rows.append(bounded(case, f"{what} of a step without documents", "", without[what], None))
        rows.append(bounded(case, f"{what} of a step with few documents", "", found["few"][what], None))
    return rows


def main() -> None:
    from kernel_timing import forget, write_gpu

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.presets import olmo_hybrid_7b
    from megatron_hybrid.distributed.process_groups import stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", default=PATTERN)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a global batch")
    parser.add_argument("--steps", type=int, default=5)
    args, _ = parser.parse_known_args()
    launch = Launch.from_environment()
    size = launch.world_size
    groups = start_distributed(launch, ParallelConfig(context_parallel_size=size), seed=0)
    model = olmo_hybrid_7b().model_copy(update={"layer_pattern": args.layers})
    rows: list[dict] = []
    for length in SEQUENCES:
        for name, precision in FORMATS.items():
            found = run_case(model, length, precision, groups, args)
            rows += rows_of(f"{args.layers}, CP{size}, {length:,} tokens, {name}", length, args.tokens, found)
            forget()
            if launch.rank == 0:
                write_gpu("documents" if size == 1 else f"documents_x{size}", rows)
    stop_distributed()


if __name__ == "__main__":
    main()
