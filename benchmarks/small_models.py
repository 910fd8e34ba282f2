"""Training steps of small models on one GPU, with CUDA graphs and without: tokens/s, time of a step, MFU, and time of its kernels.

python benchmarks/small_models.py [--out FOLDER] [NAME ...]     all models, or those named; about five minutes

A step that takes much longer than its kernels is launch-bound: the host launches kernels more slowly than the GPU runs them. Both runs
of a model are in one process, one after the other.
"""

import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
sys.path += [str(EXAMPLES / "expressivity"), str(EXAMPLES / "scaling"), str(EXAMPLES)]

STEPS, WARMUP = 20, 8
SIZES = ((32, 256), (32, 1024))
"""Sequences and tokens of a step of the models of examples/expressivity."""
OPTIMIZERS = {"plain optimizer": "false", "distributed optimizer": "true"}
LARGE, LARGE_SIZES, LARGE_TOKENS_PER_S = "hybrid of 100 M parameters", ((64, 1024),), 800_000
"""The model of examples/scaling's shapes, sequences and tokens of its step, and the goal."""


@dataclass(frozen=True)
class Case:
    """A model and its steps."""

    file: Path
    overrides: list[str]
    sizes: tuple[tuple[int, int], ...] = SIZES
    goal: float | None = None
    """Tokens/s."""


def cases() -> dict[str, Case]:
    """Return the five models of examples/expressivity, other backends and optimizers of their hybrid, and a larger hybrid."""
    from grid import MODELS, model_overrides

    file = EXAMPLES / "expressivity" / "state_tracking.yaml"
    found = {name: Case(file, model_overrides(name, "GGGA")) for name in MODELS}
    hybrid = found["hybrid_negative"].overrides
    found["hybrid_negative, backend local"] = Case(file, [*hybrid, "model.backend=local"])
    for name, value in OPTIMIZERS.items():
        found[f"hybrid_negative, {name}"] = Case(file, [*hybrid, f"parallel.distributed_optimizer={value}"])
    found[LARGE] = Case(EXAMPLES / "scaling" / "base.yaml", large_overrides(), LARGE_SIZES, LARGE_TOKENS_PER_S)
    return found


def large_overrides() -> list[str]:
    """Return the overrides of a hybrid of bytes with 12 layers of width 768."""
    from shapes import Size, make_model

    model = make_model(Size(768, 12, 12), "hybrid", 256, key_head_dim=64)
    names = ("layer_pattern", "hidden_size", "ffn_hidden_size", "vocab_size", "num_attention_heads")
    gdn = model.section("gdn")
    assert gdn is not None
    return [*(f"model.{name}={getattr(model, name)}" for name in names), f"model.gdn={gdn.model_dump_json()}"]


def measured(engine: Any, vocab_size: int, sequences: int, length: int) -> dict[str, float]:
    """Return milliseconds of a step, and of its kernels."""
    from torch.profiler import ProfilerActivity, profile

    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.profiling.engine_steps import train_one_step

    samples = torch.randint(vocab_size, (sequences, length + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch.of_samples(samples).pin_memory()

    step = partial(train_one_step, engine, [batch], 1e-5)
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
    }


def run(case: Case, impl: str, launch: Any) -> dict[tuple[int, int], dict[str, float]]:
    """Return the figures of each size of step."""
    from megatron_hybrid.arch.flops import training_flops_per_token
    from megatron_hybrid.config.load import load_run
    from megatron_hybrid.distributed.process_groups import leave_groups
    from megatron_hybrid.launch.start import start_distributed
    from megatron_hybrid.observe.throughput import peak_tflops
    from megatron_hybrid.train.engines.build import build_engine

    config = load_run(str(case.file), [*case.overrides, f"train.cuda_graph_impl={impl}"])
    engine: Any = build_engine(config, start_distributed(launch, config.parallel, config.train.seed, quiet=True))
    peak, found = peak_tflops(torch.cuda.get_device_name()), {}
    for sequences, length in case.sizes:
        figures = measured(engine, config.model.vocab_size, sequences, length)
        figures["tokens/s"] = sequences * length / figures["step"] * 1e3
        if peak is not None:
            tflops = figures["tokens/s"] * training_flops_per_token(config.model, length) / 1e12
            figures["MFU"] = 100 * tflops / peak
        found[sequences, length] = figures
    assert engine.graphed is None or engine.graphed.captured == len(case.sizes)
    engine.close()
    leave_groups()
    return found


def rows_of(name: str, case: Case, launch: Any) -> list[dict]:
    """Return the rows of a case: with graphs, next to those without."""
    from report import row

    graphs, plain = (run(case, impl, launch) for impl in ("full_iteration", "none"))
    units = {"step": "ms", "kernels of a step": "ms", "tokens/s": "", "MFU": "%"}
    rows = []
    for size, figures in graphs.items():
        for metric, ours in figures.items():
            peer = plain[size][metric]
            goal = case.goal / peer if case.goal and metric == "tokens/s" else None
            higher = metric in ("tokens/s", "MFU")
            label = f"{name}, {size[0]} x {size[1]} tokens"
            rows.append(row(label, metric, units[metric], ours, peer, "without graphs", goal, higher))
    return rows


def main() -> None:
    from report import write

    from megatron_hybrid.launch.environment import Launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    launch, rows, named = Launch.from_environment().export(), [], [x for x in sys.argv[1:] if x in cases()]
    for name, case in cases().items():
        if named and name not in named:
            continue
        found = rows_of(name, case, launch)
        for one in found:
            print(*(one[key] for key in ("case", "metric", "ours", "peer", "unit")), flush=True)
        rows += found
    write(
        "small_models",
        rows,
        ("torch", "megatron-core", "transformer-engine"),
        torch.cuda.get_device_name(),
        printed=len(rows),
    )


if __name__ == "__main__":
    main()
