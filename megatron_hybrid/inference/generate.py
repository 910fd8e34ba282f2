"""Continuation of prompts: chunked prefill, then one token per sequence at a time."""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.inference.load import NOT_FINITE_REMEDY, LoadedModel
from megatron_hybrid.inference.prompts import check_prompts, prefill
from megatron_hybrid.inference.sampling import NOT_FINITE, Sampler, Sampling
from megatron_hybrid.model.incremental import GraphedStep, IncrementalModel

IsDone = Callable[[int, list[int]], bool]


def generate(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - it is frozen
    *,
    stop_tokens: Collection[int] | None = None,
    is_done: IsDone = lambda row, tokens: False,
    chunk: int | None = None,
    cuda_graph: bool = False,
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt, step by step, until all have ended. None: the sequence has ended.

    Every sequence gets the tokens that it would get alone, up to rounding. Tensor parallel ranks agree on them.

    Args:
        stop_tokens: a sequence ends before these; None: the model's end-of-document token.
        is_done: called with the index of a prompt and the tokens that continue it. True ends the sequence.
        chunk: tokens per prompt that are processed at once; None: by the number of prompts.
        cuda_graph: replay a step as one CUDA graph.

    Raises:
        UserError: a prompt that is empty or outside the vocabulary, a number out of range, or logits that are not finite.
    """
    check_prompts(prompts, model.config.vocab_size)
    if max_tokens < 0:
        raise UserError(f"max_tokens {max_tokens}: must not be negative")
    sampler = Sampler(sampling, len(prompts))
    if not prompts or not max_tokens:
        return
    stops = set[int | None]({model.config.eos_token_id} if stop_tokens is None else stop_tokens)
    longest = max(len(prompt) for prompt in prompts)
    sequences = IncrementalModel(model.network, len(prompts), longest + max_tokens)
    step = GraphedStep(sequences) if cuda_graph else sequences.step
    rows = _Rows(len(prompts), stops, is_done)
    tokens_b = _agreed(sampler.choose(prefill(sequences, prompts, chunk)), model)
    for count in range(max_tokens):
        new = rows.add(tokens_b.tolist())
        if all(token is None for token in new):
            return
        yield new
        if rows.all_ended or count == max_tokens - 1:
            return
        tokens_b = _agreed(sampler.choose(step(tokens_b)), model)


def continuations(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - it is frozen
    *,
    stop_tokens: Collection[int] | None = None,
    is_done: IsDone = lambda row, tokens: False,
    cuda_graph: bool = False,
) -> list[list[int]]:
    """Return the tokens that continue each prompt. See `generate`."""
    options = dict(stop_tokens=stop_tokens, cuda_graph=cuda_graph)
    steps = list(generate(model, prompts, max_tokens, sampling, is_done=is_done, **options))  # type: ignore[arg-type]
    return [[token for step in steps if (token := step[row]) is not None] for row in range(len(prompts))]


def _agreed(tokens_b: torch.Tensor, model: LoadedModel) -> torch.Tensor:
    """Return the tokens of the first tensor parallel rank."""
    group = model.network.pg_collection.tp
    if group.size() > 1:
        dist.broadcast(tokens_b, group=group, group_src=0)
    return tokens_b


class _Rows:
    """Which sequences have ended, and what continues each."""

    def __init__(self, count: int, stops: set[int | None], is_done: IsDone) -> None:
        self.stops, self.is_done = stops, is_done
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.ended = [False] * count

    def add(self, tokens: list[int]) -> list[int | None]:
        """Return the tokens of sequences that have not ended before them."""
        return [self._add(row, token) for row, token in enumerate(tokens)]

    def _add(self, row: int, token: int) -> int | None:
        if self.ended[row]:
            return None
        if token == NOT_FINITE:
            raise UserError(f"the model's logits are not finite: {NOT_FINITE_REMEDY}")
        if token in self.stops:
            self.ended[row] = True
            return None
        self.tokens[row].append(token)
        self.ended[row] = self.is_done(row, self.tokens[row])
        return token

    @property
    def all_ended(self) -> bool:
        return all(self.ended)
