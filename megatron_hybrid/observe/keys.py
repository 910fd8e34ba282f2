"""Names of metrics in metrics.jsonl, and their tags in TensorBoard and W&B."""

from collections.abc import Mapping
from typing import Any, Protocol

_PERFORMANCE = {
    "seconds", "tokens_per_s", "tflops", "mfu", "format_mfu", "goodput", "goodput_tokens_per_s", "memory_gb",
    "sm_clock_mhz", "power_w", "temperature_c",
}  # fmt: skip


class Evaluation(Protocol):
    """Result on a validation set. Its text is shown on the console."""

    def metrics(self) -> Mapping[str, float]:
        """Return the values to log: `loss`, `perplexity`, ..."""


def evaluation_key(name: str, metric: str) -> str:
    """Return the name of a validation set's metric: `eval/code/loss`, or `eval_loss` for the set without a name."""
    return f"eval/{name}/{metric}" if name else f"eval_{metric}"


def evaluation_losses(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the losses of validation sets in a record, by the name of the set."""
    named = {name: record[f"eval/{name}/loss"] for name in _set_names(record)}
    unnamed = {"": record["eval_loss"]} if "eval_loss" in record else {}
    return {name: value for name, value in (unnamed | named).items() if value is not None}


def task_results(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the first metric of each task in a record, by its name: `http_status acc`."""
    sets, results = _set_names(record), dict[str, float]()
    for key, value in record.items():
        if key.startswith("eval/"):
            task, _, metric = key.removeprefix("eval/").rpartition("/")
            seen = any(name.rpartition(" ")[0] == task for name in results)
            if task not in sets and not seen and value is not None:
                results[f"{task} {metric}"] = value
    return results


def _set_names(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the validation sets in a record. Only they have a loss."""
    return [key.split("/")[1] for key in record if key.startswith("eval/") and key.endswith("/loss")]


def tag(key: str) -> str:
    """Return a metric's name in its group: `train/loss`, `eval/loss`, `eval/code/loss`, `perf/mfu`."""
    if key.startswith(("eval_", "eval/")):
        return f"eval/{key[5:]}"
    return f"{'perf' if key in _PERFORMANCE else 'train'}/{key}"
