"""Greedy decoding of a checkpoint in two ways."""

import torch

from megatron_hybrid.inference.generate import continuations
from megatron_hybrid.inference.load import load_model


def decoded_and_full(path: str, prompt: list[int], count: int, plugins: list[str]) -> tuple[list[int], list[int]]:
    """Return a prompt's greedy continuation by `generate`, and by running the whole sequence again for every token."""
    model = load_model(path, plugins=plugins)
    (decoded,) = continuations(model, [prompt], count, stop_tokens=())
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            logits = model.network(torch.tensor([tokens]))[0, -1, : model.config.vocab_size]
            tokens.append(int(logits.argmax()))
    return decoded, tokens[len(prompt) :]
