"""Log-likelihoods of continuations, and text until a stop string: the requests of tasks to a model.

The local tasks (evaluation/local_tasks.py) and lm-eval's harness (evaluation/lm_eval_model.py) both use it, so they agree.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hybrid.inference.generate import continuations
from megatron_hybrid.inference.load import NOT_FINITE_REMEDY, LoadedModel
from megatron_hybrid.inference.prompts import check_prompts, run_prompts
from megatron_hybrid.inference.sampling import Sampling
from megatron_hybrid.model.incremental import IncrementalModel

LOGIT_ROWS = 512
"""Tokens whose logits are computed at once. It bounds memory where a vocabulary is large."""


@dataclass(frozen=True)
class Score:
    """Result of a continuation."""

    log_likelihood: float
    is_greedy: bool
    """Whether greedy decoding would give the continuation."""


@dataclass
class TaskModel:
    """A loaded model with its tokenizer, and limits."""

    model: LoadedModel
    tokenizer: Tokenizer
    max_length: int
    """Longest sequence. Longer contexts lose their beginning."""
    batch_size: int = 8

    @classmethod
    def of(cls, model: LoadedModel, tokenizer: str | None, max_length: int | None, batch_size: int = 8) -> "TaskModel":
        """Return the model of a task.

        Args:
            tokenizer: `byte` or a folder; None: the model's.
            max_length: None: the length of the training sequences.

        Raises:
            UserError: no tokenizer, or no length.
        """
        name, length = tokenizer or model.tokenizer, max_length or model.sequence_length
        if name is None:
            raise UserError("--tokenizer is missing: the model's folder does not name one")
        if length is None:
            raise UserError("--max-length is missing: the model's folder does not name the length of its sequences")
        return cls(model, load_tokenizer(name), length, batch_size)

    def scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        """Return the score of each (context, continuation), in tokens.

        Raises:
            UserError: a context without tokens, a continuation longer than max_length, or logits that are not finite.
        """
        for _, continuation in pairs:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"max_length {self.max_length}: a continuation has {len(continuation)} tokens; give at least that many"
                )
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        results: dict[int, Score] = {}
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            results |= zip(batch, self._batch_scores([pairs[i] for i in batch]), strict=True)
        return [results[i] for i in range(len(pairs))]

    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Return the log-likelihood of each continuation. See `scores`."""
        return [score.log_likelihood for score in self.scores(pairs)]

    @torch.no_grad()
    def _batch_scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        whole = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        inputs = [tokens[:-1] for tokens in whole]
        check_prompts(inputs, self.model.config.vocab_size)
        sequences = IncrementalModel(self.model.network, len(pairs), max(len(tokens) for tokens in inputs))
        totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
        for start, x_sbh in run_prompts(sequences, inputs):
            for row, (tokens, (_, continuation)) in enumerate(zip(whole, pairs, strict=True)):
                first = max(len(tokens) - 1 - len(continuation), start)
                last = min(len(tokens) - 1, start + len(x_sbh))
                for at in range(first, last, LOGIT_ROWS):
                    end = min(at + LOGIT_ROWS, last)
                    logits_nv = sequences.logits(x_sbh[at - start : end - start, row])
                    target_n = torch.tensor(tokens[at + 1 : end + 1], device=logits_nv.device)
                    likelihood, is_greedy = _of_targets(logits_nv, target_n)
                    totals[row] += likelihood
                    greedy[row] &= is_greedy
        return [Score(*result) for result in zip(totals, greedy, strict=True)]

    def texts(self, contexts: Sequence[str], until: Sequence[str], max_tokens: int, sampling: Sampling) -> list[str]:
        """Return the text that continues each context, up to the first stop string.

        Raises:
            UserError: max_tokens leaves no room for a context.
        """
        room = self.max_length - max_tokens
        if room < 1:
            raise UserError(
                f"max_gen_toks {max_tokens} leaves no room for a context in max_length {self.max_length}; give fewer"
            )
        prompts = [self.tokenizer.encode(context)[-room:] for context in contexts]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        results: dict[int, str] = {}
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            results |= zip(
                batch, self._batch_texts([prompts[i] for i in batch], until, max_tokens, sampling), strict=True
            )
        return [results[i] for i in range(len(prompts))]

    def _batch_texts(
        self, prompts: list[list[int]], until: Sequence[str], max_tokens: int, sampling: Sampling
    ) -> Iterator[str]:
        def is_done(row: int, tokens: list[int]) -> bool:
            text = self.tokenizer.decode(tokens)
            return any(stop in text for stop in until if stop)

        ends = (self.tokenizer.eos_token_id, self.model.config.eos_token_id)
        stop_tokens = {token for token in ends if token is not None}
        rows = continuations(
            self.model,
            prompts,
            max_tokens,
            sampling,
            stop_tokens=stop_tokens,
            is_done=is_done,
        )
        for tokens in rows:
            text = self.tokenizer.decode(tokens)
            for stop in until:
                text = text.split(stop)[0] if stop else text
            yield text


def _of_targets(logits_nv: torch.Tensor, target_n: torch.Tensor) -> tuple[float, bool]:
    likelihoods_n = logits_nv.log_softmax(-1).gather(1, target_n[:, None])
    total = likelihoods_n.double().sum().item()
    if total != total:
        raise UserError(f"the model's logits are not finite: {NOT_FINITE_REMEDY}")
    return total, bool((logits_nv.argmax(-1) == target_n).all())


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, prefix: int) -> tuple[list[int], list[int]]:
    """Return a context and its continuation in tokens, as lm-eval splits them.

    Spaces at the end of a context belong to the continuation, and the pair is encoded as one text.

    Args:
        prefix: the token that stands for an empty context.
    """
    if not context:
        tokens = tokenizer.encode(continuation)
        return (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)
    kept = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    split = len(tokenizer.encode(kept))
    return whole[:split], whole[split:]
