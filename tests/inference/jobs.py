"""Jobs of test_generate.py, which run on ranks."""

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.inference.generate import continuations, generate
from megatron_hybrid.inference.load import LoadedModel
from megatron_hybrid.inference.sampling import Sampling
from megatron_hybrid.launch.environment import Launch
from tests.model.incremental_jobs import network_of


def greedy(model: dict, lengths: list[int], max_tokens: int) -> dict[str, list[list[int]]]:
    """Continue random prompts in several ways, and by transformers' generate one by one."""
    config = ModelConfig(**model)
    network, peer = network_of(config, Launch.from_environment().world_size)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    loaded = LoadedModel(network, config, {}, None)
    unstopped = continuations(loaded, prompts, max_tokens)
    end = unstopped[1][max_tokens // 2]  # so that one sequence ends early
    options = dict(stop_tokens={end})
    sampling = Sampling(1.0, top_k=50, top_p=0.95, seed=7)
    steps = list(generate(loaded, prompts, max_tokens, chunk=16, **options))
    return {
        "batch": continuations(loaded, prompts, max_tokens, **options),
        "alone": [continuations(loaded, [prompt], max_tokens, **options)[0] for prompt in prompts],
        "chunked": [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))],
        "transformers": [_transformers(peer, prompt, max_tokens, end) for prompt in prompts],
        "sampled": continuations(loaded, prompts, max_tokens, sampling),
        "sampled again": continuations(loaded, prompts, max_tokens, sampling),
    }


def _transformers(peer: torch.nn.Module, prompt: list[int], max_tokens: int, end: int) -> list[int]:
    options = dict(max_new_tokens=max_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
    tokens = peer.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)[0].tolist()
    tokens = tokens[len(prompt) :]
    return tokens[: tokens.index(end)] if end in tokens else tokens


def without_cache(model: dict) -> str:
    """Return the error of generating with a mixer that has no cache."""
    config = ModelConfig(**model)
    network, _ = network_of(config)
    mixer_spec("gated_delta_net").has_cache = False
    try:
        continuations(LoadedModel(network, config, {}, None), [[1]], 1)
    except UserError as error:
        return str(error)
    return ""
