"""Prefill and decoding with random weights: ours, transformers' generate, and running the whole sequence for every token.

python benchmarks/decoding.py                                   OLMo Hybrid 7B, bf16, on one GPU, batch sizes 1 and 32: 4 minutes
python benchmarks/decoding.py --model tiny --dtype fp32         on a CPU
    --batch N ...   --prompt N   --tokens N
"""

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
GOAL = 20  # times the speed of running the whole sequence for every token
TRANSFORMERS = "transformers generate"


def medium():
    """A model of 18 M parameters, for CPUs."""
    from megatron_hybrid.arch.model import ModelConfig

    gdn = dict(num_key_heads=4, num_value_heads=4, key_head_dim=48, value_head_dim=96)
    sizes = dict(hidden_size=384, ffn_hidden_size=1024, vocab_size=8192, num_attention_heads=6)
    return ModelConfig(layer_pattern="GGGA*2", gdn=gdn, **sizes)


def models() -> dict:
    from megatron_hybrid.config.presets import olmo_hybrid_7b, olmo_hybrid_tiny

    return {"7b": olmo_hybrid_7b, "medium": medium, "tiny": olmo_hybrid_tiny}


@cache
def process_groups():
    """Join a world of one rank. megatron-core forms its groups once per process."""
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    return start_distributed(Launch(0, 0, 1), ParallelConfig(), seed=0, quiet=True)


def build(config, dtype: str):
    """Return our network with random weights."""
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.precision import PrecisionConfig
    from megatron_hybrid.inference.load import LoadedModel
    from megatron_hybrid.model.hybrid_model import build_model

    local = config.model_copy(update={"backend": "local"})
    (network,) = build_model(local, ParallelConfig(), PrecisionConfig(), dtype, 1, process_groups())
    fill(network)
    return LoadedModel(network.eval(), config, {}, None)


def build_peer(config, dtype: str):
    """Return transformers' model with random weights."""
    from transformers import AutoModelForCausalLM, OlmoHybridConfig

    from megatron_hybrid.convert.hf.config import hf_from_model

    fields = hf_from_model(config, {"bf16": "bfloat16", "fp32": "float32"}[dtype], 65536)
    with torch.device(device()):
        peer = AutoModelForCausalLM.from_config(
            OlmoHybridConfig(**fields), dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        )
    fill(peer)
    return peer.eval()


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Draw weights that keep the residual stream finite; norms are ones, decay rates those of A = 1."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            parameter.fill_(1.0)
        elif parameter.dim() == 1:
            parameter.zero_()
        else:
            parameter.normal_(0.0, 0.02)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peer_kernels() -> str:
    """Name the packages whose kernels transformers runs. It uses those that it can import and reports no failed import."""
    found = [name for name in ("fla", "causal_conv1d") if find_spec(name)]
    for name in found:
        import_module(name)
    return f"transformers runs kernels of {' and '.join(found) if found else 'torch only'}"


def timed(run) -> tuple[float, object]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def ours(model, prompts: list[list[int]], count: int, graph: bool) -> dict:
    """Return seconds until the first token, decoded tokens/s, peak memory in GB and the tokens, all of the second of two runs."""
    from megatron_hybrid.inference.generate import generate

    for _ in range(2):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        steps = generate(model, prompts, count, stop_tokens=(), cuda_graph=graph)
        first, _ = timed(lambda steps=steps: next(steps))
        rest, rows = timed(lambda steps=steps: list(steps))
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    return dict(first=first, decode=len(prompts) * len(rows) / rest, memory=memory, tokens=rows)


class Clock:
    """Stopping criterion that never stops and records when each token is ready."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, tokens: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        self.times.append(timed(time.perf_counter)[1])
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def theirs(peer, prompts: list[list[int]], count: int) -> dict:
    """Measure transformers as `ours` measures our model."""
    tokens, clock = torch.tensor(prompts, device=device()), Clock()
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(tokens))
    with torch.no_grad():
        peer.generate(tokens, max_new_tokens=4, **options)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = timed(time.perf_counter)[1]
        peer.generate(tokens, max_new_tokens=count, stopping_criteria=[clock], **options)
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    first, rest = clock.times[0] - start, clock.times[-1] - clock.times[0]
    return dict(first=first, decode=len(prompts) * (len(clock.times) - 1) / rest, memory=memory)


@torch.no_grad()
def rerun(model, prompts: list[list[int]], count: int) -> float:
    """Return tokens/s if every token runs the whole sequence."""
    tokens = torch.tensor(prompts, device=device())
    model.network(tokens)
    seconds, _ = timed(lambda: [model.network(tokens)[:, -1].argmax(-1) for _ in range(count)])
    return len(prompts) * count / seconds


@torch.no_grad()
def largest_error(model, prompt: list[int], count: int) -> float:
    """Return the largest error of logits from prefill and decoding, relative to the largest logit of the full forward."""
    from megatron_hybrid.inference.prompts import prefill
    from megatron_hybrid.model.incremental import IncrementalModel

    full = model.network(torch.tensor([prompt], device=device()))[0, :, : model.config.vocab_size].float()
    at = len(prompt) - count
    sequences = IncrementalModel(model.network, 1, len(prompt))
    found = [prefill(sequences, [prompt[:at]])[0]]
    found += [sequences.step(torch.tensor([token], device=device()))[0] for token in prompt[at:]]
    return ((torch.stack(found) - full[at - 1 :]).abs().max() / full.abs().max()).item()


def cases(arguments: argparse.Namespace) -> Iterator[dict]:
    from report import bounded, row

    config, dtype = models()[arguments.model](), arguments.dtype
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(config.vocab_size, (max(arguments.batch), arguments.prompt), generator=generator).tolist()
    on_gpu = torch.cuda.is_available()
    model = build(config, dtype)
    limit = 0.05 if dtype == "bf16" else 1e-4
    error = largest_error(model, draws[0][:1000], 32)
    yield bounded(f"{arguments.model} {dtype}", "error of decoded logits", "of the largest logit", error, limit)
    results, before = {}, rerun(model, draws[:1], 4)
    for batch in arguments.batch:
        results[batch] = ours(model, draws[:batch], arguments.tokens, False)
        if on_gpu:
            eager, results[batch] = results[batch], ours(model, draws[:batch], arguments.tokens, True)
            results[batch]["first"] = eager["first"]  # without the capture, which a server does once
            case = f"{arguments.model} {dtype}, batch {batch}"
            differ = sum(a != b for a, b in zip(eager["tokens"], results[batch]["tokens"], strict=True))
            yield bounded(case, "steps whose tokens a CUDA graph changes", f"of {arguments.tokens - 1}", differ, 0)
            yield row(case, "decoding without a CUDA graph", "tokens/s", eager["decode"])
    before_fp32 = None
    if on_gpu:
        del model
        gc.collect()
        torch.cuda.empty_cache()
        model = build(config, "fp32")
        before_fp32 = rerun(model, draws[:1], 3)
    del model
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    peer = build_peer(config, dtype)
    for batch, mine in results.items():
        case = f"{arguments.model} {dtype}, batch {batch}, prompt {arguments.prompt}, {arguments.tokens} tokens"
        other = theirs(peer, draws[:batch], arguments.tokens)
        better = dict(peer_name=TRANSFORMERS, higher_is_better=True)
        yield row(case, "decoding", "tokens/s", mine["decode"], other["decode"], **better)
        rates = [batch * arguments.prompt / result["first"] for result in (mine, other)]
        yield row(case, "prefill", "tokens/s", *rates, **better)
        if on_gpu:
            yield row(case, "peak memory", "GB", mine["memory"], other["memory"], TRANSFORMERS)
        if batch == 1:
            named = dict(peer_name=f"the whole sequence per token, {dtype}", higher_is_better=True)
            yield row(case, "decoding", "tokens/s", mine["decode"], before, goal=None if on_gpu else GOAL, **named)
            if on_gpu:  # tools/generate.py ran in fp32
                named["peer_name"] = "the whole sequence per token, fp32"
                yield row(case, "decoding", "tokens/s", mine["decode"], before_fp32, goal=GOAL, **named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models(), default="7b")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=64)
    arguments, _ = parser.parse_known_args()
    from report import write

    kernels = peer_kernels()  # fails before the measurements, not after them
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    rows = []
    for found in cases(arguments):
        print(*(f"{k}={v}" for k, v in found.items() if v is not None), flush=True)
        rows.append(found)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = ("torch", "triton", "transformers", "flash-linear-attention")
    write("decoding", rows, packages, machine, notes=[kernels], printed=len(rows))


if __name__ == "__main__":
    main()
