"""Our models in EleutherAI's lm-eval harness (package lm_eval, an optional extra).

Harness and `hf` backend are lm-eval's own; only the model is ours. Ranks are data parallel: lm-eval gives each its share of the
documents. Tensor parallel ranks of a group run the same requests.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.device import local_device
from megatron_hybrid.evaluation.task_model import TaskModel
from megatron_hybrid.inference.sampling import Sampling

MAX_TOKENS = 256
"""Tokens of a continuation if a task sets no limit, as in lm-eval's `hf` backend."""


def evaluate(
    model: TaskModel,
    tasks: Sequence[str | dict[str, Any]],
    include: Sequence[str],
    fewshot: int | None,
    limit: int | None,
) -> dict[str, Any] | None:
    """Run tasks of the harness and return its results on the first data parallel rank, None on others.

    Args:
        tasks: names, or whole configurations.
        include: folders with tasks besides lm-eval's own.
        limit: number of documents per task; None: all.
    """
    manager = TaskManager(include_path=list(include) or None)
    options = dict(num_fewshot=fewshot, limit=limit, bootstrap_iters=0, log_samples=False)
    found = simple_evaluate(LmEvalModel(model), tasks=list(tasks), task_manager=manager, **options)
    return found["results"] if found is not None else None


class LmEvalModel(TemplateLM):  # type: ignore[misc]
    """A TaskModel as lm-eval's LM."""

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.ours, self._device = model, local_device()
        self._group = model.model.network.pg_collection.dp
        self._rank, self._world_size = self._group.rank(), self._group.size()

    @property
    def eot_token_id(self) -> int:
        return self.ours.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.ours.model.tokenizer or "given"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text. Special tokens are never added, as AI2's tokenizers add none."""
        return self.ours.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores = self.ours.scores([(context, continuation) for _, context, continuation in requests])
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts, in windows of max_length tokens."""
        totals = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            windows = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.ours.max_length, 1)
            scores = self.ours.scores([utils.make_disjoint_window(window) for window in windows])
            totals.append(sum(score.log_likelihood for score in scores))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return continuations. Requests with the same options are one batch."""
        results: dict[int, str] = {}
        options = [request.args[1] for request in requests]
        for number, option in enumerate(options):
            if number in results:
                continue
            same = [i for i, other in enumerate(options) if other == option]
            texts = self.ours.texts([requests[i].args[0] for i in same], *_generation(option))
            results |= zip(same, texts, strict=True)
        return [results[i] for i in range(len(requests))]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self._world_size)]
        dist.all_gather(parts, tensor, group=self._group)
        return torch.stack(parts) if tensor.dim() == 0 else torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        parts: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, parts, group=self._group, group_dst=dst)
        return parts

    def barrier(self) -> None:
        dist.barrier(self._group)


def _generation(options: dict[str, Any]) -> tuple[list[str], int, Sampling]:
    """Return (stop strings, limit, sampling) of a request's generation options."""
    known = dict(options)
    until, limit = known.pop("until", None) or [], known.pop("max_gen_toks", MAX_TOKENS)
    do_sample, temperature = known.pop("do_sample", None), known.pop("temperature", None)
    sampling = Sampling()
    if do_sample or (do_sample is None and temperature):
        sampling = Sampling(1.0 if temperature is None else temperature, known.pop("top_k", 0), known.pop("top_p", 1.0))
    if unknown := known.keys() - {"top_k", "top_p"}:
        raise UserError(f"generation_kwargs.{min(unknown)}: not supported; use until, max_gen_toks, do_sample, temperature, "
                        "top_k and top_p")  # fmt: skip
    return [until] if isinstance(until, str) else list(until), limit, sampling.check()
