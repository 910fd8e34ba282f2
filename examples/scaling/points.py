"""Points of a ladder: the loss of a model at an endpoint, with its size, tokens and FLOPs.

- `read_endpoints`: losses at the endpoints, from a run's metrics.jsonl.
- `write_points`, `read_points`: points.json of a run, and of all runs in a folder.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.observe.metrics import read_metrics

_EVALUATION = re.compile(r"eval/([^/]+)/(loss|bits_per_byte)")


@dataclass(frozen=True)
class Point:
    """An evaluated endpoint."""

    architecture: str
    size: str
    """hidden/heads/layers."""
    budget: float
    """Tokens as a multiple of 20 per parameter of the size's transformer."""
    parameters: int
    """N, without embeddings and output layer."""
    tokens: int
    flops: int
    """Of training, with the output layer."""
    epochs: float | None
    """How often the training data has been read; None: its tokens are unknown."""
    losses: dict[str, float]
    """Nats per token by validation set."""
    bits_per_byte: dict[str, float]
    """By validation set; empty if the bytes of the tokens are unknown."""

    @property
    def case(self) -> str:
        """Name in result files."""
        return f"{self.architecture}, {self.size}, {self.budget:g}x"

    @property
    def loss(self) -> float:
        """Mean over the validation sets, as the paper's over its domains."""
        return mean(self.losses.values())

    @property
    def mean_bits_per_byte(self) -> float | None:
        return mean(self.bits_per_byte.values()) if self.bits_per_byte else None


def read_endpoints(metrics: Path, endpoints: Sequence[int]) -> dict[int, dict[str, dict[str, float]]]:
    """Return `losses` and `bits_per_byte` by validation set, by the endpoints that have been evaluated."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for record in read_metrics(metrics) if metrics.exists() else ():
        if record["step"] not in endpoints:
            continue
        values: dict[str, dict[str, float]] = {"losses": {}, "bits_per_byte": {}}
        for key, value in record.items():
            if (match := _EVALUATION.fullmatch(key)) and value is not None:
                values["losses" if match[2] == "loss" else "bits_per_byte"][match[1]] = value
        if values["losses"]:
            found[record["step"]] = values
    return found


def write_points(path: Path, points: Iterable[Point]) -> None:
    """Write points.json, replacing an earlier one at once."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    os.replace(temporary, path)


def read_points(runs: Path) -> list[Point]:
    """Return the points of all runs in a folder, in the order of architecture, parameters and tokens.

    Raises:
        UserError: a file is no list of points.
    """
    points = []
    for path in sorted(runs.glob("*/points.json")):
        try:
            records: list[dict[str, Any]] = json.loads(path.read_text())
            points += [Point(**record) for record in records]
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: is no list of points ({error}); run ladder.py again, which writes it") from error
    return sorted(points, key=lambda point: (point.architecture, point.parameters, point.tokens))
