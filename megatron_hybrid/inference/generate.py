"""Continues a prompt with a loaded model.

Each new token runs the whole context through the model again, because there is no cache of states or keys. This is for
looking at a model, not for serving it.
"""

import math
from collections.abc import Iterator

import torch

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.data.agreement import checkpoint_disagreements, warn
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.inference.load import NOT_FINITE_REMEDY, LoadedModel


@torch.no_grad()
def generate(
    model: LoadedModel, prompt: list[int], max_tokens: int, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> Iterator[int]:
    """Yield tokens that continue the prompt, until the end-of-document token or max_tokens.

    Args:
        temperature: 0: always choose the most likely token.
        top_k: sample from the k most likely tokens; 0: from all.

    Raises:
        UserError: an empty prompt, a token outside the vocabulary, or a number out of range.
    """
    check_generation(model.config.vocab_size, prompt, max_tokens, temperature, top_k, seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_tokens):
        row = torch.tensor([tokens], device=local_device())
        logits = model.network(row)[0, -1, : model.config.vocab_size].float().cpu()
        token = sample_token(logits, temperature, top_k, generator)
        if token == model.config.eos_token_id:
            return
        tokens.append(token)
        yield token


def check_generation(
    vocab_size: int, prompt: list[int], max_tokens: int, temperature: float, top_k: int, seed: int
) -> None:
    """Check the arguments of `generate`. Raises UserError as it does."""
    if not prompt:
        raise UserError("the prompt has no tokens: give at least one that the tokenizer knows")
    if wrong := [token for token in prompt if not 0 <= token < vocab_size]:
        raise UserError(
            f"prompt has token {wrong[0]}: the model's vocabulary is {vocab_size}; is it the right tokenizer?"
        )
    if max_tokens < 0 or top_k < 0:
        raise UserError(f"max_tokens {max_tokens}, top_k {top_k}: must not be negative")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature {temperature}: give a finite number of at least 0")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed {seed}: give a number from 0 to 2^63 - 1")


def sample_token(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Sample a token from logits [vocabulary], which this changes.

    Raises:
        UserError: logits that are not finite.
    """
    if not bool(logits.isfinite().all()):
        raise UserError(f"the model's logits are not finite: {NOT_FINITE_REMEDY}")
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -math.inf
    scaled = (logits.double() - logits.max()) / temperature  # at most 0, so that small temperatures do not overflow
    return int(torch.multinomial(torch.softmax(scaled, -1).float(), 1, generator=generator))


def tokenize_prompt(model: LoadedModel, prompt: str, name: str | None) -> tuple[Tokenizer, list[int]]:
    """Load a tokenizer and return it with the token ids of a prompt.

    Prints a warning if the tokenizer contradicts the model, or if the prompt is longer than the training sequences.

    Args:
        name: `byte` or a folder; None: the tokenizer of the run.

    Raises:
        UserError: no tokenizer, or a prompt that is not UTF-8.
    """
    chosen = model.tokenizer if name is None else name
    if chosen is None:
        raise UserError("--tokenizer is missing: the checkpoint does not name one")
    tokenizer = load_tokenizer(chosen)
    found = checkpoint_disagreements(
        model.config, model.run, chosen, "data.tokenizer" if name is None else "--tokenizer"
    )
    warn(str(disagreement) for disagreement in dict.fromkeys(found))
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt is not UTF-8 text (character {error.start})") from None
    ids = tokenizer.encode(prompt)
    if model.sequence_length is not None and len(ids) > model.sequence_length:
        warn([f"the prompt has {len(ids)} tokens, the model was trained on sequences of {model.sequence_length}"])
    return tokenizer, ids
