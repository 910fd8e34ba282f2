"""Formats and backends in which a mixer computes, for the table that a run prints."""

from dataclasses import dataclass

from hybrid_kernels.dispatch import Choice
from megatron_hybrid.mixers.backend import Backend


@dataclass(frozen=True)
class FormatQuery:
    """Properties of a run that decide in which formats a mixer computes."""

    sequence_length: int
    """Length of whole sequences."""
    batch_size: int
    dtype: str
    fp8_attention: bool
    backend: Backend
    reason: str
    """Why this backend was chosen."""
    documents: bool = False
    """Sequences hold several documents, which do not see each other."""


def full_reason(choice: Choice) -> str:
    """Return the reason of a choice, and those for which other backends were rejected."""
    return "; ".join([choice.reason, *(f"not {name}: {lack}" for name, lack in choice.rejected.items())])
