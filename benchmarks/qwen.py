"""Qwen3.5 2B on one GPU: training steps in bf16 and FP8 next to transformers with fla in the same process, and errors of logits.

python benchmarks/qwen.py                             one H200, the whole model at sequence 8192: under 3 minutes
    --layers GGGA*3   fewer layers      --sequence N   --sequences N   of a step      --micro N   of a micro-batch
    --tiny            a small model, also on a CPU

Both train with AdamW from the same weights. transformers runs its own loss, SDPA, and fla's delta rule where fla is installed.
Errors are of four layers, relative to transformers in fp32 with its delta rule in plain torch.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

PEAK_TFLOPS = 989  # dense bf16, also for FP8
FORMATS = {"bf16": {}, "FP8 tensorwise": {"fp8_recipe": "tensorwise"}}
PEER = "transformers, fla"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CHECKED = "GGGA"


def tiny():
    """A model for CPUs."""
    from megatron_hybrid.arch.model import ModelConfig
    from testing.models import qwen

    return ModelConfig(**qwen("GGGA", 64, 4, 2, 16, 4, vocab_size=512))


def peer_of(model, dtype: torch.dtype):
    """transformers' model with random weights."""
    from testing.peers import qwen_model

    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            peer = qwen_model(model)
    finally:
        torch.set_default_dtype(torch.float32)
    peer.set_attn_implementation("sdpa")
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if "norm" in name:
                parameter.fill_(float("linear_attn" in name))  # zero-centered, but for the delta rule's
            elif "A_log" in name or "dt_bias" in name:
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.4 if "conv1d" in name else 0.02, generator=generator)
    return peer


@contextmanager
def delta_rule_in_torch() -> Iterator[None]:
    """Let transformers run its own delta rule even where fla, which refuses fp32, is installed."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    chosen = modeling.torch_chunk_gated_delta_rule
    modeling.torch_chunk_gated_delta_rule = getattr(chosen, "__wrapped__", chosen)
    try:
        yield
    finally:
        modeling.torch_chunk_gated_delta_rule = chosen


def filled_with(tensors: dict[str, torch.Tensor], chunks, layout, seed: int) -> None:
    """Fill an engine's parameters with true tensors; `MegatronEngine` calls it in place of drawing them."""
    from megatron_hybrid.precision.fp8_parameters import initial_values

    with torch.no_grad():
        for _, parameter, slices in layout.parameters(chunks):
            values = initial_values(parameter)
            values.zero_()
            for part in slices:
                part.target.narrow(values).copy_(part.source.narrow(tensors[part.tensor.name]))


def engine_of(model, tensors, precision: dict, groups, args):
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.precision import PrecisionConfig
    from megatron_hybrid.config.train import TrainConfig
    from megatron_hybrid.train.engines.megatron import MegatronEngine

    train = TrainConfig(steps=1, global_batch_size=args.sequences, micro_batch_size=args.micro, dtype="bf16")
    options = dict(precision=PrecisionConfig(**precision), fill=partial(filled_with, tensors))
    return MegatronEngine(model, train, ParallelConfig(), args.sequence, groups, **options)


def seconds_of(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Return median seconds of a step after two to warm up, and peak gigabytes."""
    seconds = []
    for index in range(steps + 2):
        if CUDA:
            torch.cuda.synchronize()
            if index == 2:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[2:])[steps // 2], torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0


def our_step(engine, samples: torch.Tensor, micro: int) -> Callable[[], None]:
    from megatron_hybrid.data.batch import Batch
    from megatron_hybrid.profiling.engine_steps import train_one_step

    batches = [Batch.of_samples(part.cpu()) for part in samples.split(micro)]

    return partial(train_one_step, engine, batches, 1e-5)


def their_step(peer, samples: torch.Tensor, micro: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=CUDA)
    parts = samples.split(micro)

    def step() -> None:
        for part in parts:
            loss = peer(part[:, :-1], labels=part[:, :-1], use_cache=False).loss / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def speeds(model, groups, args) -> list[dict]:
    from kernel_timing import forget
    from report import row

    from megatron_hybrid.arch.flops import training_flops_per_token
    from testing.peers import true_tensors_of

    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = (args.sequences, args.sequence + 1)
    samples = torch.randint(model.vocab_size, shape, generator=generator, device=DEVICE)
    tokens, size = (
        args.sequences * args.sequence,
        f"{model.num_layers} layers, {args.sequences} x {args.sequence} tokens",
    )
    peer = peer_of(model, torch.bfloat16).train()
    tensors = {name: tensor.cpu() for name, tensor in true_tensors_of(peer, model).items()}
    theirs, their_memory = seconds_of(their_step(peer, samples, args.micro), args.steps)
    del peer
    forget()
    rows = []
    for name, precision in FORMATS.items() if CUDA else [("bf16", {})]:
        engine = engine_of(model, tensors, precision, groups, args)
        print(*engine.backends(args.micro), sep="\n", flush=True)
        ours, memory = seconds_of(our_step(engine, samples, args.micro), args.steps)
        engine.close()
        del engine
        forget()
        case, peer_name = f"{size}, {name}", f"{PEER}, bf16"
        tflops = tokens / ours * training_flops_per_token(model, args.sequence) / 1e12
        rows += [
            row(
                case, "training step", "tokens/s", tokens / ours, tokens / theirs, peer_name, 1.2, higher_is_better=True
            ),
            row(case, "work", "TFLOP/s", tflops, higher_is_better=True),
            row(case, "MFU", f"of {PEAK_TFLOPS} TFLOP/s", tflops / PEAK_TFLOPS, higher_is_better=True),
            row(case, "peak memory", "GB", memory, their_memory, peer_name),
        ]
    return rows


def errors(model, groups, args) -> list[dict]:
    """Return the errors of logits of four layers, next to those of transformers in bf16."""
    from kernel_timing import forget
    from report import row

    from testing.peers import true_tensors_of

    model = model.model_copy(update={"layer_pattern": CHECKED})
    length = min(1024, args.sequence)
    tokens = torch.randint(model.vocab_size, (1, length), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    half = peer_of(model, torch.bfloat16).eval()
    tensors = {name: tensor.cpu() for name, tensor in true_tensors_of(half, model).items()}
    with torch.no_grad():
        theirs = half(tokens, use_cache=False).logits.float()
        with delta_rule_in_torch():
            exact = half.float()(tokens, use_cache=False).logits
    del half
    rows, wrong = [], ((theirs - exact).norm() / exact.norm()).item()
    for name, precision in FORMATS.items() if CUDA else [("bf16", {})]:
        engine = engine_of(model, tensors, precision, groups, args)
        with torch.no_grad():
            logits = engine.chunks[0](tokens)[..., : model.vocab_size].float()
        error = ((logits - exact).norm() / exact.norm()).item()
        goal = 0.8 if name == "bf16" else None
        rows.append(
            row(f"{CHECKED}, {length} tokens, {name}", "logits: error", "relative L2", error, wrong, PEER, goal)
        )
        engine.close()
        del engine, logits
        forget()
    return rows


def main() -> None:
    from kernel_timing import write_gpu
    from report import write

    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.qwen_presets import qwen3_5_2b
    from megatron_hybrid.distributed.process_groups import stop_distributed
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", default=None)
    parser.add_argument("--sequence", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    args, _ = parser.parse_known_args()
    model = tiny() if args.tiny else qwen3_5_2b()
    if args.layers:
        model = model.model_copy(update={"layer_pattern": args.layers})
    groups = start_distributed(Launch(0, 0, 1), ParallelConfig(), seed=0, quiet=True)
    rows = errors(model, groups, args) + speeds(model, groups, args)
    if CUDA:
        write_gpu("qwen", rows)
    else:
        write("qwen", rows, ("torch", "transformers"))
    stop_distributed()


if __name__ == "__main__":
    main()
