"""Small tasks made from data that ships with Python, for a first look at a run and for tests. Nothing is downloaded.

- `http_status`: the phrase of an HTTP status code, of four (http.HTTPStatus).
- `html_entity`: the name of a character in HTML, of four (html.entities).
- `next_month`: the month after a month, generated (calendar).
"""

import calendar
import http
import random
from html.entities import codepoint2name
from pathlib import Path
from typing import Any

from megatron_hybrid.evaluation.task_folders import new_folder, write_task

CHOICES = 4
_METRICS = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "acc_bytes")
]


def write_stdlib_tasks(folder: Path, seed: int = 0) -> None:
    """Write the tasks. The same seed gives the same files.

    Raises:
        UserError: the folder is not empty.
    """
    draw = random.Random(seed)
    new_folder(folder)
    statuses = {f"HTTP status {status.value}": status.phrase for status in http.HTTPStatus}
    write_task(folder, _multiple_choice("http_status", "{{question}} means"), _documents(statuses, draw))
    entities = {f"The HTML entity of U+{point:04X}": name for point, name in list(codepoint2name.items())[:100]}
    write_task(folder, _multiple_choice("html_entity", "{{question}} is"), _documents(entities, draw))
    months = list(calendar.month_name)[1:]
    pairs = [{"month": month, "answer": months[(i + 1) % 12]} for i, month in enumerate(months)]
    config = {
        "task": "next_month",
        "output_type": "generate_until",
        "doc_to_text": "March comes after February. May comes after April.\nThe month after {{month}} is",
        "doc_to_target": " {{answer}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(folder, config, pairs)


def _multiple_choice(name: str, text: str) -> dict[str, Any]:
    return {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": _METRICS,
    }


def _documents(answers: dict[str, str], draw: random.Random) -> list[dict[str, Any]]:
    documents = []
    every = sorted(set(answers.values()))
    for question, answer in answers.items():
        choices = draw.sample([other for other in every if other != answer], CHOICES - 1)
        at = draw.randrange(CHOICES)
        choices.insert(at, answer)
        documents.append({"question": question, "choices": choices, "answer": at})
    return documents
