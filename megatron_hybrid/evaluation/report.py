"""Results of evaluations as a table and as JSON."""

import math
from collections.abc import Mapping
from typing import Any

from megatron_hybrid.evaluation.validation_set import SetLoss

_HEADER = ("set", "tokens", "loss", "perplexity", "bits per byte")


def as_json(results: Mapping[str, SetLoss], step: int | None) -> dict[str, Any]:
    """Return the metrics of each set. The metrics of a single set are also at the top. Values that are infinite become null."""
    sets = {name: {key: _finite(value) for key, value in loss.metrics().items()} for name, loss in results.items()}
    single = next(iter(sets.values())) if len(sets) == 1 else {}
    return single | {"step": step, "sets": sets}


def as_table(results: Mapping[str, SetLoss]) -> str:
    """Return one line per set, with a header."""
    rows = [_HEADER, *(_row(name, loss) for name, loss in results.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _row(name: str, loss: SetLoss) -> tuple[str, ...]:
    bits = "unknown" if loss.bits_per_byte is None else f"{loss.bits_per_byte:.5f}"
    perplexity = f"{loss.perplexity:,.4f}" if math.isfinite(loss.perplexity) else "over 1e304"
    return name, f"{loss.tokens:,}", f"{loss.loss:.5f}", perplexity, bits


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
