"""Evaluation of local task files: multiple choice by log-likelihood, and generation with exact match or recall."""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import torch.distributed as dist
from jinja2.sandbox import SandboxedEnvironment

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.data.tokenizer import Tokenizer
from megatron_hybrid.evaluation.task_files import TaskFile
from megatron_hybrid.evaluation.task_model import TaskModel, encode_pair
from megatron_hybrid.inference.sampling import Sampling

MAX_TOKENS = 256
_TEMPLATES = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
Outcome = dict[str, float]
LogLikelihoods = Callable[[Sequence[tuple[list[int], list[int]]]], list[float]]
"""Returns the log-likelihood of each continuation, from pairs of a context and its continuation in tokens."""


def evaluate_task(model: TaskModel, task: TaskFile, limit: int | None = None) -> dict[str, float]:
    """Return the mean of each metric over a task's documents, and their number as `documents`, on all ranks.

    Data parallel ranks share the documents.

    Raises:
        UserError: a template that does not fit a document.
    """
    group = model.model.network.pg_collection.dp
    documents = task.documents[:limit]
    mine = documents[group.rank() :: group.size()]
    if task.output_type == "multiple_choice":
        outcomes = _choices(task, mine, model.tokenizer, model.log_likelihoods)
    else:
        outcomes = _generations(model, task, mine)
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, _sums(task, outcomes), group=group)
    return _means(task, gathered, len(documents))


def evaluate_choices(
    task: TaskFile, tokenizer: Tokenizer, log_likelihoods: LogLikelihoods, limit: int | None = None
) -> dict[str, float]:
    """Return what `evaluate_task` returns, for a multiple choice task.

    Args:
        log_likelihoods: scores the choices of all documents, and returns the same on all ranks.
    """
    documents = task.documents[:limit]
    return _means(task, [_sums(task, _choices(task, documents, tokenizer, log_likelihoods))], len(documents))


def _sums(task: TaskFile, outcomes: Sequence[Outcome]) -> Outcome:
    return {name: sum(outcome[name] for outcome in outcomes) for name in task.metrics}


def _means(task: TaskFile, sums: Sequence[Outcome], documents: int) -> Outcome:
    means = {name: sum(part[name] for part in sums) / documents for name in task.metrics}
    return means | {"documents": float(documents)}


def _choices(
    task: TaskFile, documents: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, log_likelihoods: LogLikelihoods
) -> list[Outcome]:
    delimiter = task.config.get("target_delimiter", " ")
    choices = [_choice_list(task, document) for document in documents]
    prefix = tokenizer.eos_token_id
    pairs = [
        encode_pair(tokenizer, context, delimiter + choice, prefix)
        for context, listed in zip(_contexts(task, documents), choices, strict=True)
        for choice in listed
    ]
    scores = iter(log_likelihoods(pairs))
    return [
        _best(task, document, listed, [next(scores) for _ in listed])
        for document, listed in zip(documents, choices, strict=True)
    ]


def _best(task: TaskFile, document: Mapping[str, Any], choices: list[str], found: list[float]) -> Outcome:
    gold = _target_index(task, document, choices)
    sizes: dict[str, Callable[[str], int]] = {
        "acc": lambda choice: 1,
        "acc_norm": len,
        "acc_bytes": lambda choice: len(choice.encode()),
    }
    outcome = {}
    if "bits_per_byte" in task.metrics:
        outcome["bits_per_byte"] = -found[gold] / math.log(2) / len(choices[gold].encode())
    for name in task.metrics:
        if name not in sizes:
            continue
        per_unit = [value / sizes[name](choice) for value, choice in zip(found, choices, strict=True)]
        outcome[name] = float(per_unit.index(max(per_unit)) == gold)
    return outcome


def _generations(model: TaskModel, task: TaskFile, documents: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    options = task.config.get("generation_kwargs") or {}
    until = options.get("until") or [task.config.get("fewshot_delimiter", "\n\n")]
    stops = [until] if isinstance(until, str) else until
    sampling = Sampling(float(options.get("temperature", 1.0))) if options.get("do_sample") else Sampling()
    limit = options.get("max_gen_toks", MAX_TOKENS)
    texts = model.texts(_contexts(task, documents), stops, limit, sampling)
    return [_match(task, _render(task, "doc_to_target", d), text) for d, text in zip(documents, texts, strict=True)]


def _match(task: TaskFile, target: Any, text: str) -> Outcome:
    targets = [str(t) for t in target] if isinstance(target, list) else [str(target)]
    folds = any(entry.get("ignore_case") for entry in task.config.get("metric_list") or [])
    text, targets = (text.lower(), [t.lower() for t in targets]) if folds else (text, targets)
    found = sum(t in text for t in targets) / len(targets)
    outcomes = {"exact_match": float(text in targets), "recall": found}
    return {name: outcomes[name] for name in task.metrics}


def _contexts(task: TaskFile, documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return description, few-shot examples and question of each document."""
    between = task.config.get("fewshot_delimiter", "\n\n")
    shown = "".join(f"{_text(task, e)}{_answer(task, e)}{between}" for e in task.examples)
    return [task.config.get("description", "") + shown + _text(task, document) for document in documents]


def _text(task: TaskFile, document: Mapping[str, Any]) -> str:
    return str(_render(task, "doc_to_text", document))


def _answer(task: TaskFile, document: Mapping[str, Any]) -> str:
    if task.output_type == "multiple_choice":
        choices = _choice_list(task, document)
        answer = choices[_target_index(task, document, choices)]
    else:
        target = _render(task, "doc_to_target", document)
        answer = str(target[0] if isinstance(target, list) else target)
    return str(task.config.get("target_delimiter", " ")) + answer


def _choice_list(task: TaskFile, document: Mapping[str, Any]) -> list[str]:
    template = task.config["doc_to_choice"]
    if isinstance(template, list):
        return [_fill(task, "doc_to_choice", str(choice), document) for choice in template]
    choices = _render(task, "doc_to_choice", document)
    if isinstance(choices, str):
        choices = _literal(choices)
    if not isinstance(choices, list) or not choices or not all(str(choice) for choice in choices):
        raise UserError(f"{task.name}: doc_to_choice: {choices!r:.100} is not a list of texts")
    return [str(choice) for choice in choices]


def _target_index(task: TaskFile, document: Mapping[str, Any], choices: list[str]) -> int:
    template = task.config["doc_to_target"]
    target = _render(task, "doc_to_target", document)
    if isinstance(target, str):  # as in lm-eval, digits of a field are a choice's text, and those of a template its index
        is_text = target in choices and (template in document or not target.isdigit())
        target = choices.index(target) if is_text else int(target) if target.isdigit() else target
    if not isinstance(target, int) or not 0 <= target < len(choices):
        raise UserError(f"{task.name}: doc_to_target: {target!r:.100} is neither a choice nor the index of one")
    return target


def _render(task: TaskFile, name: str, document: Mapping[str, Any]) -> Any:
    """Return a field of the document if the template is its name, else the template filled in."""
    template = task.config[name]
    if not isinstance(template, str):
        return template
    return document[template] if template in document else _fill(task, name, template, document)


def _fill(task: TaskFile, name: str, template: str, document: Mapping[str, Any]) -> str:
    try:
        return _TEMPLATES.from_string(template).render(**document)
    except jinja2.TemplateError as error:
        raise UserError(f"{task.name}: {name}: {error}") from None


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
