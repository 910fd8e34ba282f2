"""Chunked prefill: a batch of unequal prompts through an IncrementalModel.

Suffixes of tensor names: b sequences, s tokens of a chunk, h hidden size.
"""

from collections.abc import Iterator, Sequence

import torch

from megatron_hybrid.arch.packing import round_up
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.mixers.cache import CHUNK_MULTIPLE
from megatron_hybrid.model.incremental import IncrementalModel

TOKENS = 16384
"""Tokens of all sequences in a chunk. It bounds the memory of activations."""
KERNEL_CHUNK = 64
"""The delta rule's kernels process this many tokens at a time."""


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Check that every prompt has tokens, all in the vocabulary.

    Raises:
        UserError: names the token.
    """
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt has no tokens: give at least one that the tokenizer knows")
        if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
            raise UserError(
                f"prompt has token {wrong[0]}: the model's vocabulary is {vocab_size}; is it the right tokenizer?"
            )


def run_prompts(
    model: IncrementalModel, prompts: Sequence[Sequence[int]], chunk: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Run prompts through a model that has no tokens yet. Yield each chunk's first position and hidden states [s, b, h].

    Args:
        chunk: tokens per sequence in a chunk, a multiple of CHUNK_MULTIPLE; None: such that all chunks have about TOKENS tokens.
    """
    chunk = chunk or round_up(max(1, TOKENS // len(prompts)), KERNEL_CHUNK)
    longest = max(len(prompt) for prompt in prompts)
    for start in range(0, longest, chunk):
        tokens = torch.zeros(len(prompts), round_up(min(chunk, longest - start), CHUNK_MULTIPLE), dtype=torch.long)
        parts = [prompt[start : start + chunk] for prompt in prompts]
        for row, part in zip(tokens, parts, strict=True):
            row[: len(part)] = torch.tensor(part, dtype=torch.long)
        lengths = torch.tensor([len(part) for part in parts])
        yield start, model.extend(tokens.to(local_device()), lengths.to(local_device()))


def prefill(model: IncrementalModel, prompts: Sequence[Sequence[int]], chunk: int | None = None) -> torch.Tensor:
    """Run prompts and return the logits [b, v] of the token after each."""
    last: dict[int, torch.Tensor] = {}
    for start, x_sbh in run_prompts(model, prompts, chunk):
        for row, prompt in enumerate(prompts):
            if 0 <= len(prompt) - 1 - start < len(x_sbh):
                last[row] = x_sbh[len(prompt) - 1 - start, row]
    return model.logits(torch.stack([last[row] for row in range(len(prompts))]))
