"""Text in front of and behind generation: prompts to tokens, and their continuations printed."""

from collections.abc import Sequence

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.data.agreement import checkpoint_disagreements, warn
from megatron_hybrid.data.streaming import ContinuationText
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hybrid.inference.generate import continuations, generate
from megatron_hybrid.inference.load import LoadedModel
from megatron_hybrid.inference.prompts import check_prompts
from megatron_hybrid.inference.sampling import Sampling


def tokenize_prompts(model: LoadedModel, prompts: Sequence[str], name: str | None) -> tuple[Tokenizer, list[list[int]]]:
    """Load a tokenizer and return it with the token ids of prompts.

    Prints a warning if the tokenizer contradicts the model, or if a prompt is longer than the training sequences.

    Args:
        name: `byte` or a folder; None: the model's.

    Raises:
        UserError: no tokenizer, or a prompt that is not UTF-8, has no tokens or has tokens outside the vocabulary.
    """
    chosen = model.tokenizer if name is None else name
    if chosen is None:
        raise UserError("--tokenizer is missing: the checkpoint does not name one")
    tokenizer = load_tokenizer(chosen)
    found = checkpoint_disagreements(
        model.config, model.run, chosen, "data.tokenizer" if name is None else "--tokenizer"
    )
    warn(str(disagreement) for disagreement in dict.fromkeys(found))
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    check_prompts(encoded, model.config.vocab_size)
    longest = max(len(ids) for ids in encoded)
    if model.sequence_length is not None and longest > model.sequence_length:
        warn([f"the prompt has {longest} tokens, the model was trained on sequences of {model.sequence_length}"])
    return tokenizer, encoded


def _encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"--prompt is not UTF-8 text (character {error.start})") from None
    return tokenizer.encode(prompt)


def print_continuations(
    model: LoadedModel, prompts: Sequence[str], tokenizer: str | None, max_tokens: int, sampling: Sampling, graph: bool
) -> None:
    """Print prompts with their continuations: a single one token by token, several in order at the end.

    Args:
        graph: replay decoding steps as a CUDA graph.
    """
    loaded, encoded = tokenize_prompts(model, prompts, tokenizer)
    if len(prompts) > 1:
        texts = (ContinuationText(loaded, prompt) for prompt in encoded)
        rows = continuations(model, encoded, max_tokens, sampling, cuda_graph=graph)
        for prompt, text, tokens in zip(prompts, texts, rows, strict=True):
            print(prompt + "".join(text.add(token) for token in tokens) + text.end())
        return
    text = ContinuationText(loaded, encoded[0])
    print(prompts[0], end="", flush=True)
    for (token,) in generate(model, encoded, max_tokens, sampling, cuda_graph=graph):
        if token is not None:
            print(text.add(token), end="", flush=True)
    print(text.end())
