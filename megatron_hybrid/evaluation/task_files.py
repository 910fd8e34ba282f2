"""Local task files: the subset of lm-eval's YAML format that needs no harness.

Multiple choice, and generation with exact match, from JSON Lines files. A field outside the subset is an error that names it.
lm-eval runs the same files (`megatron-hybrid evaluate-tasks --lm-eval`) and gives the same numbers.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_hybrid.base import nearest
from megatron_hybrid.base.errors import UserError

FIELDS = {
    "task", "dataset_path", "dataset_kwargs", "test_split", "validation_split", "fewshot_split", "output_type", "doc_to_text",
    "doc_to_target", "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter", "num_fewshot", "fewshot_config",
    "generation_kwargs", "metric_list", "metadata",
}  # fmt: skip
METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "bits_per_byte"),
    "generate_until": ("exact_match", "recall"),
}
"""Metrics by output_type. acc_norm and acc_bytes divide log-likelihoods by characters and bytes. bits_per_byte is that of the
right choice; recall is the share of answers that the text contains, as in RULER. lm-eval has neither for these output types."""
GENERATION = {"until", "max_gen_toks", "do_sample", "temperature"}


@dataclass(frozen=True)
class TaskFile:
    """A task as its file describes it, with its documents."""

    name: str
    output_type: str
    config: Mapping[str, Any]
    documents: list[dict[str, Any]]
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Few-shot examples."""

    @property
    def metrics(self) -> list[str]:
        """Names of its metrics."""
        listed = self.config.get("metric_list")
        return [entry["metric"] for entry in listed] if listed else [METRICS[self.output_type][0]]


def task_paths(path: Path) -> list[Path]:
    """Return the task files at a path: itself, or the YAML files of a folder that is not empty.

    Raises:
        UserError: there are none.
    """
    found = sorted(path.glob("*.yaml")) if path.is_dir() else [path] if path.is_file() else []
    if not found:
        raise UserError(f"{path}: no task is there; give a YAML file in lm-eval's format, or a folder of them")
    return found


def read_config(path: Path) -> dict[str, Any]:
    """Return a task file's configuration, with the paths of its data made absolute: they are relative to the file.

    Raises:
        UserError: the file is not YAML, or uses tags such as !function.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: it cannot be read without lm-eval: {str(error).splitlines()[0]}; use --lm-eval"
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise UserError(f"{path}: task: is missing; it must name the task")
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if isinstance(files, dict):
        absolute = {split: str((path.parent / name).resolve()) for split, name in files.items()}
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": absolute}
    return config


def read_task(path: Path) -> TaskFile:
    """Read a task file and its documents.

    Raises:
        UserError: a field that is unknown, missing or not in the subset, or data that cannot be read.
    """
    config = read_config(path)
    if unknown := sorted(config.keys() - FIELDS):
        raise UserError(
            f"{path}: {unknown[0]}: not supported without lm-eval (the nearest field is {nearest.word(unknown[0], FIELDS)}); "
            "use --lm-eval"
        )
    output_type = config.get("output_type", "generate_until")
    if output_type not in METRICS:
        raise UserError(f"{path}: output_type: {output_type} is not one of {', '.join(METRICS)}; use --lm-eval")
    needed = ["doc_to_text", "doc_to_target", *(["doc_to_choice"] if output_type == "multiple_choice" else [])]
    if missing := [name for name in needed if name not in config]:
        raise UserError(f"{path}: {missing[0]}: is missing")
    _check_options(path, config, output_type)
    split = config.get("test_split") or config.get("validation_split")
    shots = config.get("num_fewshot") or 0
    examples = _documents(path, config, config.get("fewshot_split"), "fewshot_split")[:shots] if shots else []
    if len(examples) < shots:
        raise UserError(f"{path}: num_fewshot: {shots} is more than the {len(examples)} documents of fewshot_split")
    return TaskFile(config["task"], output_type, config, _documents(path, config, split, "test_split"), examples)


def read_tasks(paths: Iterable[str]) -> list[TaskFile]:
    """Read the tasks at paths, each a task file or a folder of them.

    Raises:
        UserError: as `task_paths` and `read_task`.
    """
    return [read_task(path) for name in paths for path in task_paths(Path(name))]


def generate_text(tasks: Iterable[TaskFile]) -> bool:
    """Return whether any of the tasks needs generated text."""
    return any(task.output_type == "generate_until" for task in tasks)


def _check_options(path: Path, config: Mapping[str, Any], output_type: str) -> None:
    if config.get("num_fewshot") and (config.get("fewshot_config") or {}) != {"sampler": "first_n"}:
        raise UserError(
            f"{path}: fewshot_config: examples are the first ones; write {{sampler: first_n}}, or use --lm-eval"
        )
    for entry in config.get("metric_list") or []:
        if not isinstance(entry, dict) or entry.get("metric") not in METRICS[output_type]:
            known = ", ".join(METRICS[output_type])
            raise UserError(f"{path}: metric_list: {entry!r:.100} is not one of {known}; use --lm-eval")
        if extra := sorted(entry.keys() - {"metric", "aggregation", "higher_is_better", "ignore_case"}):
            raise UserError(f"{path}: metric_list.{extra[0]}: not supported; use --lm-eval")
    if unknown := sorted((config.get("generation_kwargs") or {}).keys() - GENERATION):
        raise UserError(f"{path}: generation_kwargs.{unknown[0]}: not supported; use --lm-eval")


def _documents(path: Path, config: Mapping[str, Any], split: object, field_name: str) -> list[dict[str, Any]]:
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") != "json" or not isinstance(files, dict):
        raise UserError(
            f"{path}: dataset_path: only json with dataset_kwargs.data_files is read; nothing is downloaded"
        )
    if split not in files:
        raise UserError(f"{path}: {field_name}: {split} is not in dataset_kwargs.data_files ({', '.join(files)})")
    name = files[split]
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        documents = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read as JSON Lines: {error}") from None
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise UserError(f"{name}: expected one JSON object per line, and at least one")
    return documents
