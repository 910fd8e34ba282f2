"""Muon's update against AdamW's and against torch.optim.Muon's, on one GPU: eight layers of OLMo Hybrid 7B's widths in bf16.

python benchmarks/muon_update.py [--layers GGGA*2] [--sequences 4]        needs emerging-optimizers

Each optimizer runs in an engine of its own, as the trainer does: clipping, update, weights cast to bf16. torch.optim.Muon updates the
same matrices, unpacked, in fp32. A step has `--sequences` micro-batches of 8,192 tokens.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

SEQUENCE, STEPS, WARMUP = 8192, 10, 3
OPTIMIZERS = {
    "AdamW": {"kind": "adamw"},
    "Muon": {"kind": "muon"},
    "Muon, Nesterov": {"kind": "muon", "muon_nesterov": True},
    "Muon, fp32 GEMMs in TF32": {"kind": "muon", "muon_fp32_matmul_prec": "high"},
}


def median_ms(step, prepare=lambda: None, synchronized=torch.cuda.synchronize) -> float:
    """Return the median milliseconds of a call, before and after which the GPU is idle.

    Args:
        prepare: is called before each, and not timed.
    """
    times = []
    for _ in range(WARMUP + STEPS):
        prepare()
        synchronized()
        start = time.perf_counter()
        step()
        synchronized()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[WARMUP:])[STEPS // 2]


def measure(model, optimizer: dict, groups, sequences: int) -> dict[str, float]:
    """Return milliseconds of an update and of a whole step, and bytes, of one engine."""
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.train import TrainConfig
    from megatron_hybrid.profiling.engine_steps import fill_at_random, random_batches, train_one_step
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    train = TrainConfig(steps=1, global_batch_size=sequences, dtype="bf16", optimizer=optimizer)
    torch.cuda.reset_peak_memory_stats()
    engine = MegatronEngine(model, train, ParallelConfig(), SEQUENCE, groups, fill=fill_at_random)
    batches = random_batches(sequences, 1, SEQUENCE, model.vocab_size, seed=0)

    found = {"step": median_ms(partial(train_one_step, engine, batches, 1e-5))}
    found["update"] = median_ms(
        lambda: engine.update(1e-5, engine.gradient_norm()), prepare=lambda: engine.forward_backward(batches[:1])()
    )
    states = (state for shard in engine.optimizer.shards().values() for state in shard.states.values())
    found["state"] = sum(state.nbytes for state in states) / 1e9
    found["peak"] = torch.cuda.max_memory_allocated() / 1e9
    engine.close()
    return found


def torch_muon_ms(model) -> float:
    """Return milliseconds of torch.optim.Muon's update of the true matrices, in fp32."""
    from megatron_hybrid.arch.tensors import model_parameters

    shapes = [tensor.shape for packed in model_parameters(model) if packed.is_gemm for tensor in packed.tensors]
    matrices = [torch.nn.Parameter(torch.randn(shape, device="cuda") * 0.02) for shape in shapes]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return median_ms(torch.optim.Muon(matrices, lr=1e-5, nesterov=False).step)


def iteration_flops(model, optimizer: dict) -> float:
    """Return the FLOPs of the Newton-Schulz iterations of an update."""
    from megatron_hybrid.arch.optimizers import muon
    from megatron_hybrid.arch.tensors import model_parameters
    from megatron_hybrid.config.train import OptimizerConfig

    settings = OptimizerConfig(**{**optimizer, "muon_fp32_matmul_prec": "medium"})
    return sum(muon.SPEC.update_flops(packed, 1, settings) for packed in model_parameters(model) if packed.is_gemm)


def rows_of(found: dict[str, dict[str, float]], torch_ms: float, model) -> list[dict]:
    from report import row

    rows = []
    for case, mine in found.items():
        if case == "AdamW":
            continue
        for metric, unit in (("update", "ms"), ("step", "ms"), ("state", "GB"), ("peak", "GB")):
            rows.append(row(case, metric, unit, mine[metric], found["AdamW"][metric], "AdamW"))
        tflops = iteration_flops(model, OPTIMIZERS[case]) / mine["update"] / 1e9
        rows.append(
            row(case, "Newton-Schulz GEMMs over the time of the update", "TFLOP/s", tflops, higher_is_better=True)
        )
    rows.append(row("Muon", "update", "ms", found["Muon"]["update"], torch_ms, "torch.optim.Muon, matrices alone"))
    return rows


def main() -> None:
    from kernel_timing import forget, write_gpu

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.presets import olmo_hybrid_7b
    from megatron_hybrid.distributed.process_groups import stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", default="GGGA*2", help="layer pattern, at the 7B model's widths")
    parser.add_argument("--sequences", type=int, default=4, help="micro-batches of a step")
    args, _ = parser.parse_known_args()
    model = olmo_hybrid_7b().model_copy(update={"layer_pattern": args.layers})
    groups, found = start_distributed(Launch.from_environment(), ParallelConfig(), seed=0), {}
    for case, optimizer in OPTIMIZERS.items():
        found[case] = measure(model, optimizer, groups, args.sequences)
        print(case, found[case], flush=True)
        forget()
    write_gpu("muon_update", rows_of(found, torch_muon_ms(model), model))
    stop_distributed()


if __name__ == "__main__":
    main()
