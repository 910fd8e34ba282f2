"""Jobs of test_tasks.py, which run on ranks."""

from pathlib import Path
from typing import Any

import torch

from megatron_hybrid.evaluation.local_tasks import _choice_list, _contexts, _target_index
from megatron_hybrid.evaluation.task_files import read_task, task_paths
from testing.task_parity import by_hf_backend, figures, make_models, make_tasks, ours, texts_of_both

Figures = dict[tuple[str, str], float]


def results_of_evaluators(folder: str, limit: int, harness: bool) -> dict[str, Any]:
    """Return the figures of every evaluator that is installed."""
    checkpoint, export = make_models(Path(folder))
    tasks = make_tasks(Path(folder))
    found = {name: figures(ours(path, tasks, limit, False)) for name, path in (("own", checkpoint), ("export", export))}
    found["by transformers"] = found["own"] | _multiple_choice_by_transformers(export, tasks, limit)
    if harness:
        found["lm-eval"] = figures(ours(checkpoint, tasks, limit, True))
        found["hf backend"] = figures(by_hf_backend(export, tasks, limit))
        found["texts"], found["hf texts"] = texts_of_both(checkpoint, export)
    return found


def results_on_ranks(folder: str, limit: int) -> Figures:
    """Return the figures where data parallel ranks share the documents."""
    return figures(ours(Path(folder) / "checkpoint", Path(folder) / "tasks", limit, False))


def _multiple_choice_by_transformers(export: Path, tasks: Path, limit: int) -> Figures:
    """Return accuracies by transformers' model, one choice at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(export).float(), AutoTokenizer.from_pretrained(export)

    def likelihood(context: str, choice: str) -> float:
        tokens = torch.tensor([tokenizer(context + choice).input_ids])
        count = len(tokenizer(choice).input_ids)
        with torch.no_grad():
            found = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
        return found[-count:].sum().item()

    results: Figures = {}
    for task in (read_task(path) for path in task_paths(tasks)):
        if task.output_type != "multiple_choice":
            continue
        for name, size in (("acc", lambda c: 1), ("acc_norm", len), ("acc_bytes", lambda c: len(c.encode()))):
            right = 0
            for document in task.documents[:limit]:
                (context,), choices = _contexts(task, [document]), _choice_list(task, document)
                scores = [likelihood(context, f" {choice}") / size(choice) for choice in choices]
                right += scores.index(max(scores)) == _target_index(task, document, choices)
            results[task.name, name] = right / limit
    return results
