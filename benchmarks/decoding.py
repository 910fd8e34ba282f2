"""Prefill and decoding with random weights: ours, transformers' generate, and running the whole sequence for every token.

python benchmarks/decoding.py                                   OLMo Hybrid 7B, bf16, on one GPU, batch sizes 1 and 32: 4 minutes
python benchmarks/decoding.py --model tiny --dtype fp32         on a CPU
    --batch N ...   --prompt N   --tokens N
"""

import argparse
import functools
import gc
import sys
import time
from collections.abc import Iterator
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


@functools.cache
def one_rank():
    """Return the process groups of this process alone."""
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.launch.environment import Launch
    from megatron_hybrid.launch.start import start_distributed

    return start_distributed(Launch(0, 0, 1), ParallelConfig(), seed=0, quiet=True)


def build(config, dtype: str):
    """Our network with random weights."""
    from megatron_hybrid.config.parallel import ParallelConfig
    from megatron_hybrid.config.precision import PrecisionConfig
    from megatron_hybrid.inference.load import LoadedModel
    from megatron_hybrid.model.hybrid_model import build_model

    local = config.model_copy(update={"backend": "local"})
    (network,) = build_model(local, ParallelConfig(), PrecisionConfig(), dtype, 1, one_rank())
    fill(network)
    return LoadedModel(network.eval(), config, {}, None)


def build_peer(config, dtype: str):
    """transformers' model with random weights."""
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
    """Draw weights that keep the residual stream finite; norms are ones, decay rates those of A = 1.

    They are the same in every dtype, because they are rounded to bf16.
    """
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            parameter.fill_(1.0)
        elif parameter.dim() == 1:
            parameter.zero_()
        else:
            parameter.copy_((0.02 * torch.randn(parameter.shape, device=parameter.device)).bfloat16())


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(run) -> tuple[float, object]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def ours(model, prompts: list[list[int]], count: int, graph: bool) -> dict:
    """Seconds until the first token, decoded tokens per second and peak memory. The second of two runs counts."""
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
    """Stopping criterion that never stops, and records when each token is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, tokens: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        self.times.append(timed(time.perf_counter)[1])
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def theirs(peer, prompts: list[list[int]], count: int) -> dict:
    """As `ours`, of transformers."""
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
    """Tokens per second if every token runs the whole sequence."""
    tokens = torch.tensor(prompts, device=device())
    model.network(tokens)
    seconds, _ = timed(lambda: [model.network(tokens)[:, -1].argmax(-1) for _ in range(count)])
    return len(prompts) * count / seconds


@torch.no_grad()
def full_logits(model, prompt: list[int], count: int) -> torch.Tensor:
    """Return the logits [count + 1, v] of the last tokens from one forward pass."""
    full = model.network(torch.tensor([prompt], device=device()))[0, len(prompt) - count - 1 :]
    return full[:, : model.config.vocab_size].float()


@torch.no_grad()
def decoded_logits(model, prompt: list[int], count: int, graph: bool) -> torch.Tensor:
    """As `full_logits`, from prefill and `count` decoded tokens."""
    from megatron_hybrid.inference.prompts import prefill
    from megatron_hybrid.model.incremental import GraphedStep, IncrementalModel

    sequences = IncrementalModel(model.network, 1, len(prompt))
    step = GraphedStep(sequences) if graph else sequences.step
    found = [prefill(sequences, [prompt[:-count]])[0]]
    found += [step(torch.tensor([token], device=device()))[0].clone() for token in prompt[-count:]]
    return torch.stack(found)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the RMS error relative to the RMS."""
    return ((found - expected).norm() / expected.norm()).item()


def exact_cases(model, name: str, prompt: list[int], full: torch.Tensor, on_gpu: bool) -> Iterator[dict]:
    """Decoding in fp32 against one forward pass in fp32."""
    from report import bounded

    count = len(full) - 1
    eager = decoded_logits(model, prompt, count, False)
    yield bounded(name, "error of decoded logits", "relative RMS", error(eager, full), 1e-4)
    if on_gpu:
        graphed = decoded_logits(model, prompt, count, True)
        yield bounded(name, "error of a CUDA graph's logits", "relative RMS", error(graphed, eager), 1e-5)


def cases(arguments: argparse.Namespace) -> Iterator[dict]:
    from report import bounded, row

    config, dtype = models()[arguments.model](), arguments.dtype
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(config.vocab_size, (max(arguments.batch), arguments.prompt), generator=generator).tolist()
    on_gpu = torch.cuda.is_available()
    prompt, count, name = draws[0][:1000], 32, f"{arguments.model} {dtype}"
    before_fp32 = truth = None
    if on_gpu and dtype == "bf16":
        model = build(config, "fp32")
        truth, before_fp32 = full_logits(model, prompt, count), rerun(model, draws[:1], 3)
        yield from exact_cases(model, f"{arguments.model} fp32", prompt, truth, on_gpu)
        del model
        gc.collect(), torch.cuda.empty_cache()
    model = build(config, dtype)
    full = full_logits(model, prompt, count)
    if truth is None:
        yield from exact_cases(model, name, prompt, full, on_gpu)
    else:
        eager, graphed = (decoded_logits(model, prompt, count, graph) for graph in (False, True))
        errors = [error(x, truth) for x in (eager, full)]
        yield row(name, "error of decoded logits", "relative RMS", *errors, f"a forward pass in {dtype}", goal=0.8)
        yield bounded(name, "error of a CUDA graph's logits", "relative RMS", error(graphed, eager), errors[1])
    results, before = {}, rerun(model, draws[:1], 4)
    for batch in arguments.batch:
        results[batch] = ours(model, draws[:batch], arguments.tokens, False)
        if on_gpu:
            eager, results[batch] = results[batch], ours(model, draws[:batch], arguments.tokens, True)
            results[batch]["first"] = eager["first"]  # without the capture, which a server does once
            yield row(f"{name}, batch {batch}", "decoding without a CUDA graph", "tokens/s", eager["decode"])
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
            goal = None if before_fp32 else GOAL
            yield row(case, "decoding", "tokens/s", mine["decode"], before, goal=goal, **named)
            if before_fp32:  # tools/generate.py ran in fp32
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

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    packages = ("torch", "triton", "transformers", "flash-linear-attention")
    rows: list[dict] = []
    for found in cases(arguments):
        rows.append(found)
        write("decoding", rows, packages, machine, printed=len(rows) - 1)  # the result file grows as it goes


if __name__ == "__main__":
    main()
